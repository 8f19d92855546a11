"""Textual-inversion embeddings: learned rows of placeholder tokens, in the spellings that are about.

    <placeholder>            diffusers (`learned_embeds.safetensors`): (n, dim) or (dim,); the key is the word
    string_to_param.*        A1111 (`.pt`): SD 1 and 2
    emb_params, emp_params   kohya sd-scripts; OneTrainer
    clip_l, clip_g           two text encoders: (n, 768) and (n, 1280)

The word is the file's name where the file does not say it. Written is diffusers' spelling, which
`pipe.load_textual_inversion` reads when there is one word; with two text encoders `clip_l` and `clip_g`. These say one
word a file: several words with two text encoders have the names that they have beside a LoRA (see `bundles`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from scumble.adapters.state import AdapterState, LayerPath, TokenState
from scumble.errors import FormatError
from scumble.formats.bundles import beside, rows, sizes, token_tensors
from scumble.formats.codec import cannot_represent
from scumble.formats.container import TensorFile
from scumble.formats.metadata import TOKENS, compact, from_header, parse_table, to_header
from scumble.formats.pairs import Decoded, count

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDING_NAME = "learned_embeds.safetensors"
"""The file name that diffusers looks for in a folder."""

_ROOTS = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "emb_params": "text_encoder",
    "emp_params": "text_encoder",
    "string_to_param.*": "text_encoder",
}
"""Whole names of tensors -> the text encoder that they are for; the word is said elsewhere."""
_WRITTEN = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
_BRACKETED = re.compile(r"<[^<>]+>")
_PLAIN = re.compile(r"[^.:/]+")


class Embedding:
    """Learned tokens alone, as diffusers' example script, sd-scripts, A1111 and OneTrainer write them."""

    name = "embedding"

    def matches(self, file: TensorFile) -> bool:
        """Whether its names are whole names of embeddings, or words with a matrix or a row each."""
        if file.parts or not file.tensors:
            return False
        names = [name for name in file.tensors if not _aside(name)]
        if any(name in _ROOTS for name in names):
            return all(name in _ROOTS for name in names)
        if names and all(map(beside, names)):
            return True
        said = TOKENS in file.metadata or len(names) == 1
        words = all(_BRACKETED.fullmatch(name) or (said and _PLAIN.fullmatch(name)) for name in names)
        return words and all(
            file.tensors[name].ndim in (1, 2) and file.tensors[name].is_floating_point() for name in names
        )

    def decode(self, file: TensorFile, layers: Collection[LayerPath] | None) -> Decoded:
        """See `Codec.decode`."""
        outputs = [name for name in file.tensors if name.endswith("_out") and _aside(name)]
        if outputs:
            raise FormatError(
                f"unsupported: {outputs[0][:120]!r} is an output embedding, which acts on the text encoder's result. "
                "Nothing of the file was used."
            )
        vectors: dict[str, dict[str, Tensor]] = {}
        used = []
        for name, tensor in file.tensors.items():
            if name in _ROOTS:
                word = _word(file)
                if _ROOTS[name] in vectors.get(word, {}):
                    raise FormatError(f"{file.label} holds two embeddings for one text encoder. Not applied.")
                vectors.setdefault(word, {})[_ROOTS[name]] = rows(name, tensor)
            elif (ours := beside(name)) is not None:
                root, word = ours
                vectors.setdefault(word, {})[root] = rows(name, tensor)
            elif not _aside(name):
                vectors[name] = {"text_encoder": rows(name, tensor)}
            else:
                continue
            used.append(name)
        lengths = {word: {len(tensor) for tensor in found.values()} for word, found in vectors.items()}
        unequal = [word for word, found in lengths.items() if len(found) > 1]
        if unequal:
            raise FormatError(
                f"{file.label} has unequal numbers of vectors for the two text encoders. Not applied."
            )
        said = ", ".join(f"{word} ({count(max(n), 'vector')})" for word, n in sorted(lengths.items()))
        ignored = tuple(name for name in file.tensors if name not in used)
        tokens = {word: TokenState(found) for word, found in vectors.items()}
        state = AdapterState({}, tokens, from_header(file.metadata))
        return Decoded(state, tuple(used), {}, ignored, (said[:200],))

    def obstacle(self, state: AdapterState) -> str | None:
        """See `Codec.obstacle`."""
        if state.layers:
            return f"it holds learned tokens alone, and this adapter changes {count(state.layers, 'layer')}"
        if not state.tokens:
            return "there is no learned token"
        roots = {root for token in state.tokens.values() for root in token.vectors}
        if roots - set(_WRITTEN):
            return f"it has no place for {', '.join(sorted(roots - set(_WRITTEN)))}"
        strange = [
            word for word in state.tokens if word in _ROOTS or _aside(word) or not _PLAIN.fullmatch(word)
        ]
        return f"{strange[0]!r} can't be a tensor's name there" if strange else None

    def encode(self, state: AdapterState) -> TensorFile:
        """See `Codec.encode`."""
        if self.obstacle(state) is not None:
            raise cannot_represent(self, state)
        header = to_header(state.metadata, {})
        return TensorFile(_named(state.tokens), header | {TOKENS: compact(sizes(state.tokens))})


def _named(tokens: Mapping[str, TokenState]) -> dict[str, Tensor]:
    """The vectors by the names that they are written under."""
    if all(set(token.vectors) == {"text_encoder"} for token in tokens.values()):
        return {word: token.vectors["text_encoder"] for word, token in tokens.items()}
    if len(tokens) > 1:
        return token_tensors(tokens)
    return {_WRITTEN[root]: tensor for token in tokens.values() for root, tensor in token.vectors.items()}


def one_by_one(tokens: Mapping[str, TokenState]) -> dict[str, AdapterState]:
    """File name -> a token alone: what diffusers, which reads one word a file, is given."""
    if len(tokens) == 1:
        return {EMBEDDING_NAME: AdapterState({}, dict(tokens))}
    return {
        f"learned_embeds-{number}.safetensors": AdapterState({}, {word: token})
        for number, (word, token) in enumerate(tokens.items(), 1)
    }


def _aside(name: str) -> bool:
    """Names beside the embedding itself: A1111's ids, OneTrainer's output embeddings."""
    return name.startswith("string_to_token") or name in ("clip_l_out", "clip_g_out", "emp_params_out")


def _word(file: TensorFile) -> str:
    """What the file's embedding is called: as its header says, else as the file is called."""
    if TOKENS in file.metadata:
        said = list(parse_table(file.metadata[TOKENS], TOKENS))
        if len(said) == 1:
            return said[0]
    if file.path is None:
        raise FormatError("An embedding of this kind is called like its file, and it has none.")
    return file.path.stem
