"""Bundles: embeddings that travel in the file of a LoRA, as learned tokens.

    tokens_beside_lora.<text encoder>.<token>   ours, beside diffusers' names: (n, dim)
    bundle_emb.<token>.clip_l, .clip_g          OneTrainer: one tensor a text encoder, (n, dim) or (dim,)
    bundle_emb.<token>.string_to_param.*        A1111, LyCORIS: SD 1 and 2

diffusers refuses a whole file for one name without "lora" in it, and leaves names of no component alone: ours passes
both, and unmodified diffusers loads the LoRA of such a file as if it were alone.

Output embeddings (`clip_l_out`) act on the text encoder's result, which nothing here can hold: they are refused.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from scumble.adapters.state import TokenState
from scumble.errors import FormatError
from scumble.formats.container import TensorFile
from scumble.formats.pairs import Decoded, count

if TYPE_CHECKING:
    from torch import Tensor

BESIDE = "tokens_beside_lora."
_OURS = re.compile(r"tokens_beside_lora\.(?P<root>[a-z0-9_]+)\.(?P<token>.+)", re.DOTALL)
_TENSOR = re.compile(r"bundle_emb\.(?P<token>[^.]+)\.(?P<kind>.+)")
_ROOTS = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "clip_h": "text_encoder",
    "string_to_param.*": "text_encoder",
    "emb_params": "text_encoder",
}


def with_tokens(file: TensorFile, decoded: Decoded) -> Decoded:
    """`decoded` with the embeddings that `file` bundles as its tokens.

    Raises:
        FormatError: one is malformed, or an output embedding.
    """
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    names = []
    for name, tensor in file.tensors.items():
        ours = beside(name)
        if ours is not None:
            root, token = ours
            found[token][root] = rows(name, tensor)
            names.append(name)
            continue
        match = _TENSOR.fullmatch(name)
        if match is None:
            continue
        if match["kind"].endswith("_out"):
            raise FormatError(
                f"unsupported: {name[:120]!r} is an output embedding. Nothing of the file was used."
            )
        if match["kind"] not in _ROOTS:
            continue
        found[match["token"]][_ROOTS[match["kind"]]] = rows(name, tensor)
        names.append(name)
    if not found:
        return decoded
    tokens = {token: TokenState(vectors) for token, vectors in found.items()}
    return replace(
        decoded,
        state=replace(decoded.state, tokens={**decoded.state.tokens, **tokens}),
        used=(*decoded.used, *names),
        unused={name: why for name, why in decoded.unused.items() if name not in names},
        notes=(*decoded.notes, f"with {count(tokens, 'token')}: {', '.join(sorted(tokens))[:200]}"),
    )


def beside(name: str) -> tuple[str, str] | None:
    """(text encoder, token) of a tensor under our names; None for any other."""
    match = _OURS.fullmatch(name)
    return None if match is None else (match["root"], match["token"])


def token_tensors(tokens: Mapping[str, TokenState]) -> dict[str, Tensor]:
    """Learned tokens under the names that may stand beside diffusers' own."""
    return {
        f"{BESIDE}{root}.{word}": tensor
        for word, token in tokens.items()
        for root, tensor in token.vectors.items()
    }


def sizes(tokens: Mapping[str, TokenState]) -> dict[str, int]:
    """token -> number of vectors"""
    return {word: max(map(len, token.vectors.values())) for word, token in tokens.items()}


def rows(name: str, tensor: Tensor) -> Tensor:
    """A token's vectors as (n, dim).

    Raises:
        FormatError: its shape is neither that nor (dim,), or it holds integers.
    """
    if tensor.ndim not in (1, 2) or not tensor.is_floating_point():
        raise FormatError(
            f"The embedding {name[:120]!r} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected floating "
            "point, (n, dim) or (dim,)."
        )
    return tensor.reshape(-1, tensor.shape[-1])
