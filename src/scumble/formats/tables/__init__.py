"""Tables: facts about families of base models, as data without logic."""
