"""TokenRows: learned embedding rows of placeholder tokens, beside a text encoder's frozen table.

The table itself is never trained, enlarged or copied: a visible wrapper looks a placeholder's ids up in the
rows and every other id in the table, so that gradients reach the rows and nothing else.

Adapters know rows; which ids a placeholder has is the affair of a `Vocabulary` (see `models.vocabulary`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from scumble.adapters.names import one_word
from scumble.adapters.state import TokenState
from scumble.errors import AdapterError, NotFinite


class Vocabulary(Protocol):
    """What gives placeholders their ids, and takes them back."""

    @property
    def end(self) -> int | None:
        """The id that ends every prompt."""

    def add(self, placeholders: Mapping[str, int]) -> Mapping[str, tuple[int, ...]]:
        """placeholder -> number of vectors, to placeholder -> that many ids.

        Raises:
            AdapterError: a placeholder is in the vocabulary already. Nothing was changed.
        """

    def remove(self, placeholders: Iterable[str]) -> None:
        """Forget placeholders that `add` took in."""


def _of_base(name: str) -> Any:
    """A property that reads the table: library code asks it for `weight`, `embedding_dim`, ..."""
    return property(lambda self: getattr(self.base, name), doc=f"The table's `{name}`.")


LARGEST_IS_END = 2
"""CLIP's configs from before transformers 4.31 call this id the end of the text: the largest id is taken for it then,
which a placeholder's would be."""


class TokenTable(nn.Module):
    """A frozen embedding table, and learned rows for ids that are lent to placeholders.

    Law: for ids of no placeholder the output is bit-identical to the table's, and no gradient reaches it.
    """

    weight = _of_base("weight")
    num_embeddings = _of_base("num_embeddings")
    embedding_dim = _of_base("embedding_dim")
    padding_idx = _of_base("padding_idx")

    base: nn.Embedding
    known: Tensor
    """(n,) ids of all rows, ascending"""

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__()
        self.base = base  # first, so that the encoder's dtype is still that of its table
        self.rows = nn.ParameterList()
        self.register_buffer("known", torch.zeros(0, dtype=torch.long), persistent=False)
        self.owners: dict[str, TokenRows] = {}
        self.slots: list[tuple[nn.Module, str, nn.Module]] = []
        """(parent, attribute, what hung there) of each place where it hangs."""
        self.pools: list[nn.Module] = []
        """Text models that pool at the largest id, unless told where the end is."""
        self.training = base.training

    def arrange(self) -> None:
        """Take the owners' rows in the order of their ids."""
        found = sorted(
            ((ids, rows) for owner in self.owners.values() for ids, rows in owner.rows_in(self)),
            key=lambda pair: pair[0],
        )
        self.rows = nn.ParameterList(rows for _, rows in found)
        flat = [number for ids, _ in found for number in ids]
        self.known = torch.tensor(flat, dtype=torch.long, device=self.base.weight.device)

    def forward(self, ids: Tensor) -> Tensor:
        """(..., ) ids -> (..., dim), in the table's dtype."""
        if not len(self.known):
            found: Tensor = self.base(ids)
            return found
        place = torch.searchsorted(self.known, ids).clamp(max=len(self.known) - 1)
        lent = self.known[place] == ids
        frozen: Tensor = self.base(ids.masked_fill(lent, 0))
        rows = torch.cat(list(self.rows)).to(frozen.dtype)
        return torch.where(lent.unsqueeze(-1), functional.embedding(place, rows), frozen)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return "placeholders: " + ", ".join(name for owner in self.owners.values() for name in owner.vectors)


class TokenRows:
    """The learned rows of one or several placeholder tokens, in one model.

    Laws: after `eject` every text encoder holds the very same embedding module as before, with the same bits,
    and every vocabulary knows the words it knew; several TokenRows may be in one model, ejected in any order;
    an error in `attach` leaves the model as it was.

    Used as a context manager, they are ejected at the end.
    """

    name: str
    vectors: Mapping[str, Mapping[str, nn.Parameter]]
    """placeholder -> text encoder -> rows (n, dim), fp32"""

    def __init__(
        self,
        name: str,
        roots: Mapping[str, nn.Module],
        vocabularies: Mapping[str, Vocabulary],
        tokens: Mapping[str, TokenState],
        *,
        trainable: bool = False,
    ) -> None:
        """Rows with the values of `tokens`, copied, not yet attached.

        Args:
            name: must be new in this model.
            roots: name -> module, e.g. `{"unet": unet, "text_encoder": text_encoder}`.
            vocabularies: text encoder's name -> its vocabulary. Every one must get rows.
            tokens: placeholder -> values.
            trainable: whether the rows require gradients.

        Raises:
            AdapterError: rows for other text encoders than there are, or of another width; or two placeholders are
                one word.
            NotFinite: a value is NaN or infinite.
        """
        self.name = name
        self._roots = {root: roots[root] for root in vocabularies}
        self._vocabularies = dict(vocabularies)
        self._ids: dict[str, Mapping[str, tuple[int, ...]]] = {}
        self._means: dict[str, float] = {}
        self._words = _words(tokens)
        for placeholder, state in tokens.items():
            self._check(placeholder, state)
        self.vectors = {
            placeholder: {
                root: nn.Parameter(
                    rows.detach().to(table_of(roots[root]).weight.device, torch.float32, copy=True),
                    requires_grad=trainable,
                )
                for root, rows in state.vectors.items()
            }
            for placeholder, state in tokens.items()
        }

    def _check(self, placeholder: str, state: TokenState) -> None:
        lacks = [root for root in self._vocabularies if root not in state.vectors]
        if lacks and set(state.vectors) < set(self._vocabularies):
            raise AdapterError(
                f"Token {placeholder!r} has rows for {' and '.join(state.vectors) or 'nothing'} alone; this model "
                f"reads text with {' and '.join(lacks)} too. The file is half of one for this model, or made for a "
                "base with fewer text encoders. Ask for the whole, or train the token on this base."
            )
        if set(state.vectors) != set(self._vocabularies):
            raise AdapterError(
                f"Token {placeholder!r} was learned for {' and '.join(sorted(state.vectors)) or 'nothing'}; "
                f"this model reads text with {' and '.join(self._vocabularies) or 'nothing'}. It is for "
                "another family of bases."
            )
        for root, rows in state.vectors.items():
            width = table_of(self._roots[root]).embedding_dim
            if rows.dim() != 2 or not len(rows) or rows.shape[1] != width:
                raise AdapterError(
                    f"The rows of token {placeholder!r} have shape {tuple(rows.shape)}; {root} of this model "
                    f"takes (n, {width}). It was learned on another base."
                )
            if not rows.is_meta and not bool(torch.isfinite(rows).all()):
                raise NotFinite(
                    f"Token {placeholder!r} holds NaN or infinity. The model was not changed. Take an "
                    "earlier checkpoint, or train again with a lower learning rate."
                )
        if len({len(rows) for rows in state.vectors.values()}) > 1:
            raise AdapterError(f"Token {placeholder!r} has unequal numbers of vectors in the text encoders.")

    # Being in the model

    @property
    def attached(self) -> bool:
        """Whether the placeholders are in the model now."""
        return bool(self._ids)

    @property
    def sizes(self) -> dict[str, int]:
        """placeholder -> number of vectors"""
        return {name: len(next(iter(rows.values()))) for name, rows in self.vectors.items()}

    def attach(self) -> Self:
        """Put the rows into the text encoders and the placeholders into their vocabularies.

        Raises:
            AdapterError: they are there already, or a vocabulary knows a placeholder. Nothing was changed.
        """
        if self.attached:
            raise AdapterError(f"The tokens of {self.name!r} are already in the model.")
        with ExitStack() as undo:
            ids: dict[str, Mapping[str, tuple[int, ...]]] = {}
            for root, vocabulary in self._vocabularies.items():
                ids[root] = vocabulary.add({self._words[name]: size for name, size in self.sizes.items()})
                undo.callback(vocabulary.remove, tuple(self._words.values()))
            tables = {root: _wrapped(self._roots[root], self._vocabularies[root]) for root in ids}
            undo.callback(_unwrap_idle, self._roots.values())
            taken = [root for root, table in tables.items() if self.name in table.owners]
            if taken:
                raise AdapterError(
                    f"{taken[0]} already holds tokens of an adapter {self.name!r}. Eject it first, or choose "
                    "another name."
                )
            undo.pop_all()
        self._ids = ids
        for table in tables.values():
            table.owners[self.name] = self
            table.arrange()
        return self

    def eject(self) -> None:
        """Take rows and placeholders out again; `attach` puts them back.

        Raises:
            AdapterError: they are not in the model, or somebody replaced an embedding table meanwhile.
        """
        if not self.attached:
            raise AdapterError(
                f"The tokens of {self.name!r} are not in the model, so there is nothing to eject."
            )
        for root, module in self._roots.items():
            table = module.get_input_embeddings()  # type: ignore[operator]
            if not isinstance(table, TokenTable) or table.owners.get(self.name) is not self:
                raise AdapterError(
                    f"The token embedding of {root} was replaced by a {type(table).__name__} after the tokens "
                    f"of {self.name!r} came in, so they can't be ejected exactly. Undo that first."
                )
        for root, module in self._roots.items():
            table = module.get_input_embeddings()  # type: ignore[operator]
            del table.owners[self.name]
            table.arrange()
            self._vocabularies[root].remove(tuple(self._words.values()))
        self._ids = {}
        _unwrap_idle(self._roots.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.attached:
            self.eject()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without these tokens, for the length of a `with` block."""
        was = self.attached
        if was:
            self.eject()
        try:
            yield
        finally:
            if was:
                self.attach()

    def rows_in(self, table: TokenTable) -> Iterator[tuple[tuple[int, ...], nn.Parameter]]:
        """(ids, rows) of each placeholder in the text encoder whose table that is."""
        for root, ids in self._ids.items():
            if self._roots[root].get_input_embeddings() is table:  # type: ignore[operator]
                for placeholder, rows in self.vectors.items():
                    yield ids[self._words[placeholder]], rows[root]

    # Values

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """("<text encoder>.<placeholder>", rows)"""
        for placeholder, rows in self.vectors.items():
            for root, parameter in rows.items():
                yield f"{root}.{placeholder}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """The rows, in the order of `named_parameters`."""
        return (parameter for _, parameter in self.named_parameters())

    def state(self) -> dict[str, TokenState]:
        """placeholder -> values, as copies on the CPU."""
        return {
            placeholder: TokenState({root: row.detach().cpu().clone() for root, row in rows.items()})
            for placeholder, rows in self.vectors.items()
        }

    @torch.no_grad()
    def load_state(self, tokens: Mapping[str, TokenState]) -> None:
        """Take the values of `tokens` in place, so that optimizers keep their parameters.

        Raises:
            AdapterError: other placeholders, or other shapes; nothing is changed then.
            NotFinite: a value is NaN or infinite.
        """
        if set(tokens) != set(self.vectors):
            raise AdapterError(
                f"This state belongs to another adapter: it has the tokens {', '.join(tokens) or 'none'}, "
                f"here are {', '.join(self.vectors) or 'none'}."
            )
        for placeholder, state in tokens.items():
            self._check(placeholder, state)
            here, there = self.sizes[placeholder], len(next(iter(state.vectors.values())))
            if here != there:
                raise AdapterError(
                    f"This state belongs to another adapter: token {placeholder!r} has {there} vectors in it "
                    f"and {here} here."
                )
        for placeholder, state in tokens.items():
            for root, rows in state.vectors.items():
                self.vectors[placeholder][root].copy_(rows)

    @torch.no_grad()
    def bound_norms(self, pull: float, limit: float | None = None) -> None:
        """Bring every row's norm nearer to the mean norm of its table's rows.

        A row outside the lengths that the text encoder was trained on drowns the rest of a prompt, or is not
        heard.

        Args:
            pull: 0 leaves norms alone, 1 sets them to the mean; between, that part of the way.
            limit: rows longer than so many times the mean are shortened to that.
        """
        for rows in self.vectors.values():
            for root, parameter in rows.items():
                if root not in self._means:  # the table is frozen
                    self._means[root] = mean_norm(self._roots[root])
                mean = self._means[root]
                norms = parameter.norm(dim=1, keepdim=True).clamp(min=1e-12)
                wanted = norms + pull * (mean - norms)
                if limit is not None:
                    wanted = wanted.clamp(max=limit * mean)
                changed = wanted != norms
                parameter.copy_(torch.where(changed, parameter * (wanted / norms), parameter))


def _words(names: Iterable[str]) -> dict[str, str]:
    """name -> word.

    Raises:
        AdapterError: two are one word.
    """
    names_of: dict[str, str] = {}
    for name in names:
        other = names_of.setdefault(one_word(name), name)
        if other != name:
            raise AdapterError(
                f"The tokens {other!r} and {name!r} would both be the word {one_word(name)!r} in a prompt, which has "
                "no blanks. Rename one of them in the file."
            )
    return {name: word for word, name in names_of.items()}


def table_of(root: nn.Module) -> nn.Embedding:
    """A text encoder's own embedding table, without a wrapper.

    Raises:
        AdapterError: it has none.
    """
    found = root.get_input_embeddings() if hasattr(root, "get_input_embeddings") else None  # type: ignore[operator]
    table = found.base if isinstance(found, TokenTable) else found
    if not isinstance(table, nn.Embedding):
        raise AdapterError(f"A {type(root).__name__} has no token embedding, so it can't learn tokens.")
    return table


@torch.no_grad()
def mean_norm(root: nn.Module) -> float:
    """The mean norm of the rows of a text encoder's table."""
    return table_of(root).weight.float().norm(dim=1).mean().item()


@contextmanager
def resting_tokens(roots: Mapping[str, nn.Module]) -> Iterator[None]:
    """Every TokenRows that is in the model now leaves it for the length of a `with` block."""
    owners: dict[int, TokenRows] = {}
    for root in roots.values():
        for module in root.modules():
            if isinstance(module, TokenTable):
                owners |= {id(owner): owner for owner in module.owners.values()}
    with ExitStack() as stack:
        for owner in owners.values():
            stack.enter_context(owner.disabled())
        yield


def _slots(root: nn.Module, embedding: nn.Embedding) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, attribute, what hangs there) of the table, and of others that share its weight: T5 keeps two."""
    return [
        (parent, name, child)
        for parent in root.modules()
        for name, child in parent._modules.items()
        if isinstance(child, nn.Embedding)
        and child.weight is embedding.weight
        and not isinstance(parent, TokenTable)
    ]


def _wrapped(root: nn.Module, vocabulary: Vocabulary) -> TokenTable:
    """The root's TokenTable, hung around its table if there is none yet. While it hangs there, the pooled embedding is
    that of the prompt's end."""
    table = root.get_input_embeddings()  # type: ignore[operator]
    if isinstance(table, TokenTable):
        return table
    wrapper = TokenTable(table_of(root))
    wrapper.slots = _slots(root, wrapper.base)
    for parent, name, _ in wrapper.slots:
        setattr(parent, name, wrapper)
    if vocabulary.end is not None:
        wrapper.pools = [m for m in root.modules() if m.__dict__.get("eos_token_id") == LARGEST_IS_END]
        for module in wrapper.pools:
            module.eos_token_id = vocabulary.end  # type: ignore[assignment]
    return wrapper


def _unwrap_idle(roots: Iterable[nn.Module]) -> None:
    """Put a table back in its place where no owner is left."""
    for root in roots:
        table = root.get_input_embeddings()  # type: ignore[operator]
        if isinstance(table, TokenTable) and not table.owners:
            for parent, name, embedding in table.slots:
                setattr(parent, name, embedding)
            for module in table.pools:
                module.eos_token_id = LARGEST_IS_END  # type: ignore[assignment]
