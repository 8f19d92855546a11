"""Evaluation: what an adapter learned, obeys, broke and copied, as numbers with intervals and a page of pictures."""
