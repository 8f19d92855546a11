"""Laws of learned tokens: they come and leave without a trace, in any order, and only their rows get gradients."""

from __future__ import annotations

import copy
import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from scumble.adapters import Adapter, AdapterState, LoraSettings, TokenState, base_state, merge
from scumble.adapters.tokens import TokenRows, TokenTable
from scumble.errors import AdapterError
from scumble.models import FAMILIES
from scumble.models.family import BaseModel, Conditioning

PROMPTS = ["a <fox> and a <dog>", "a <bird>", "a fox, <fox>", "no new word", "<dog>" * 90, ""]
WORDS = {"<fox>": 3, "<dog>": 1, "<bird>": 2}


@pytest.fixture(scope="module", params=list(FAMILIES))
def base(request: pytest.FixtureRequest) -> BaseModel:
    """Left by every test as it was: that is the law."""
    return FAMILIES.get(str(request.param)).tiny(1)


def token(base: BaseModel, word: str, seed: int = 0) -> dict[str, TokenState]:
    generator = torch.Generator().manual_seed(seed + len(word))
    return {
        word: TokenState(
            {
                root: torch.randn(
                    WORDS[word], module.get_input_embeddings().embedding_dim, generator=generator
                )
                for root in base.vocabularies
                for module in [base.roots[root]]
            }
        )
    }


def rows(base: BaseModel, word: str, trainable: bool = False) -> TokenRows:
    return TokenRows(word, base.roots, base.vocabularies, token(base, word), trainable=trainable)


class Snapshot:
    """All that must be the same again afterwards."""

    def __init__(self, base: BaseModel) -> None:
        self.base = base
        self.modules = {name: module for root in base.roots.values() for name, module in root.named_modules()}
        self.weights = {
            root: {name: tensor.clone() for name, tensor in module.state_dict().items()}
            for root, module in base.roots.items()
        }
        self.tokenizers = {root: _tokenizer(words) for root, words in base.vocabularies.items()}
        self.backends = {root: one._tokenizer for root, one in self.tokenizers.items()}
        self.text = {root: backend.to_str() for root, backend in self.backends.items()}
        self.pools = pools(base)
        self.answers = embeds(base)

    def check(self) -> None:
        now = {name: module for root in self.base.roots.values() for name, module in root.named_modules()}
        assert now.keys() == self.modules.keys() and all(now[name] is self.modules[name] for name in now)
        for root, module in self.base.roots.items():
            state = module.state_dict()
            assert state.keys() == self.weights[root].keys()
            assert all(torch.equal(state[name], tensor) for name, tensor in self.weights[root].items())
        for root, tokenizer in self.tokenizers.items():
            assert tokenizer._tokenizer is self.backends[root]
            assert tokenizer._tokenizer.get_vocab_size() == self.backends[root].get_vocab_size()
            assert _words(tokenizer._tokenizer.to_str()) == _words(self.text[root])
        assert pools(self.base) == self.pools
        assert torch.equal(embeds(self.base), self.answers)


def pools(base: BaseModel) -> list[int]:
    """Where the text models look for the end of a prompt."""
    modules = [module for root in base.roots.values() for module in root.modules()]
    return [module.eos_token_id for module in modules if hasattr(module, "eos_token_id")]  # type: ignore[misc]


def _tokenizer(vocabulary: Any) -> Any:
    return vocabulary._words()


def _words(text: str) -> Any:
    import json

    return {k: v for k, v in json.loads(text).items() if k in ("added_tokens", "model", "normalizer")}


def embeds(base: BaseModel, prompts: list[str] = PROMPTS) -> Tensor:
    """All that the text says, (B, n)."""
    with torch.no_grad():
        return flat(base.encode_prompts(prompts))


def flat(said: Conditioning) -> Tensor:
    parts = [part.flatten(1) for part in (said.tokens, said.pooled) if part is not None]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("leaving", list(itertools.permutations(WORDS)))
def test_they_leave_in_any_order_and_no_trace_stays(base: BaseModel, leaving: tuple[str, ...]) -> None:
    before = Snapshot(base)
    there = {word: rows(base, word).attach() for word in WORDS}
    left = list(WORDS)
    for word in leaving:
        there[word].eject()
        left.remove(word)
        found = embeds(base)
        for other in left:
            there[other].eject()
        before.check()
        for other in left:
            there[other].attach()
        assert torch.equal(embeds(base), found), "the ids may be others now; the meaning is not"
    before.check()


def test_an_absent_placeholder_changes_no_other_prompt(base: BaseModel) -> None:
    bare = embeds(base)
    with rows(base, "<fox>").attach():
        found = embeds(base)
    same = [torch.equal(one, other) for one, other in zip(found, bare, strict=True)]
    assert same == ["<fox>" not in prompt for prompt in PROMPTS]


def test_unmodified_pipelines_read_the_same(base: BaseModel) -> None:
    pipeline: Any = base.pipeline()
    with rows(base, "<fox>").attach(), rows(base, "<dog>").attach():
        # some pipelines want to be told that no encoder has a prompt of its own
        taken = inspect.signature(pipeline.encode_prompt).parameters.keys()
        own: dict[str, Any] = dict.fromkeys(taken & {"prompt_2", "prompt_3"})
        own |= dict.fromkeys(taken & {"do_classifier_free_guidance"}, False)
        theirs = pipeline.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, **own)
        found = [part for part in theirs if part is not None][:2]  # Flux gives the places of its tokens too
        assert torch.equal(embeds(base), flat(Conditioning(*found)))
        assert base.token_counts(["a <fox>"])[0] == [base.token_counts(["a"])[0][0] + 3]


def test_gradients_reach_the_rows_and_nothing_else(base: BaseModel) -> None:
    before = Snapshot(base)
    taught = rows(base, "<fox>", trainable=True).attach()
    flat(base.encode_prompts(["a <fox>"])).square().sum().backward()
    assert all(row.grad is not None and bool((row.grad != 0).any(1).all()) for row in taught.parameters())
    mine = {id(row) for row in taught.parameters()}
    for root in base.roots.values():
        assert all(p.grad is None and not p.requires_grad for p in root.parameters() if id(p) not in mine)
    taught.eject()
    before.check()


def test_rows_are_used_in_their_order(base: BaseModel) -> None:
    root, *_ = base.vocabularies
    with rows(base, "<fox>").attach() as taught:
        (ids, row), *_ = taught.rows_in(base.roots[root].get_input_embeddings())
        table = base.roots[root].get_input_embeddings()
        assert isinstance(table, TokenTable)
        found = table(torch.tensor([[0, *reversed(ids), 1]]))
        own = table.base(torch.tensor([0, 1]))
        assert torch.equal(found[0], torch.stack([own[0], *reversed(list(row)), own[1]]).to(found.dtype))


def test_state_and_load_are_inverse(base: BaseModel) -> None:
    taught = rows(base, "<fox>")
    state = AdapterState({}, taught.state())
    with Adapter.load(base.roots, state, vocabularies=base.vocabularies) as adapter:
        assert adapter.state().equal(state)
        found = embeds(base)
        adapter.strength = 0.0
        assert torch.equal(embeds(base), Snapshot(base).answers)
        adapter.strength = 0.5
        assert torch.equal(embeds(base), found), "a word is there, or it is not"
    other = rows(base, "<fox>")
    other.load_state(
        {word: TokenState({k: v + 1 for k, v in t.vectors.items()}) for word, t in state.tokens.items()}
    )
    assert not AdapterState({}, other.state()).equal(state)


@pytest.mark.parametrize("strength", [1.0, -0.5, 0.0])
def test_an_adapter_with_words_leaves_the_base_as_it_was(base: BaseModel, strength: float) -> None:
    with Adapter.inject(base.roots, "attention", LoraSettings(rank=2)) as fresh:
        layers = fresh.state().layers
    before = Snapshot(base)
    state = AdapterState(layers, token(base, "<dog>"))
    adapter = Adapter.load(base.roots, state, strength=strength, vocabularies=base.vocabularies)
    with adapter.disabled():
        assert torch.equal(embeds(base), before.answers)
    adapter.eject()
    before.check()
    adapter.attach()
    adapter.eject()
    before.check()


def test_what_fails_leaves_no_trace(base: BaseModel) -> None:
    before = Snapshot(base)
    first = rows(base, "<fox>").attach()
    with pytest.raises(AdapterError, match="in use already"):
        TokenRows("other", base.roots, base.vocabularies, token(base, "<fox>")).attach()
    with pytest.raises(AdapterError, match="already holds tokens of an adapter '<fox>'"):
        TokenRows("<fox>", base.roots, base.vocabularies, token(base, "<dog>")).attach()
    with pytest.raises(AdapterError, match="already in the model"):
        first.attach()
    wrong = {"<dog>": TokenState({root: torch.zeros(2, 5) for root in base.vocabularies})}
    with pytest.raises(AdapterError, match=r"takes \(n, \d+\)"):
        TokenRows("dog", base.roots, base.vocabularies, wrong)
    with pytest.raises(AdapterError, match="text_encoder_2"):
        TokenRows(
            "dog",
            base.roots,
            base.vocabularies,
            {"<dog>": TokenState({"text_encoder_2": torch.zeros(1, 32)})},
        )
    with pytest.raises(AdapterError, match="vocabularies"):
        Adapter.load(base.roots, AdapterState({}, token(base, "<dog>")))
    first.eject()
    with pytest.raises(AdapterError, match="nothing to eject"):
        first.eject()
    before.check()


def test_an_adapter_with_words_is_not_merged_into_weights(base: BaseModel) -> None:
    before = Snapshot(base)
    state = AdapterState({}, token(base, "<dog>"))
    adapter = Adapter.load(base.roots, state, vocabularies=base.vocabularies)
    with pytest.raises(AdapterError, match="brings the words <dog>"):
        merge(adapter, base.roots)
    adapter.eject()
    before.check()


def test_a_table_that_somebody_replaced_is_not_ejected_blindly(base: BaseModel) -> None:
    root, *_ = base.vocabularies
    taught = rows(base, "<fox>").attach()
    table = base.roots[root].get_input_embeddings()
    base.roots[root].set_input_embeddings(copy.deepcopy(table.base))
    with pytest.raises(AdapterError, match="was replaced by a Embedding"):
        taught.eject()
    base.roots[root].set_input_embeddings(table)
    taught.eject()


def test_the_bases_state_does_not_show_them(base: BaseModel) -> None:
    bare = {root: base_state(base.roots[root]) for root in base.vocabularies}
    with rows(base, "<fox>").attach():
        found = {root: base_state(base.roots[root]) for root in base.vocabularies}
    for root, state in bare.items():
        assert found[root].keys() == state.keys()
        assert all(torch.equal(found[root][name], state[name]) for name in state)


def test_norms_are_pulled_to_the_tables(base: BaseModel) -> None:
    root, *_ = base.vocabularies
    mean = base.roots[root].get_input_embeddings().weight.norm(dim=1).mean()
    taught = rows(base, "<fox>")
    row, *_ = taught.parameters()
    before, norms = row.detach().clone(), row.detach().norm(dim=1)
    taught.bound_norms(0.0)
    assert torch.equal(row, before)
    taught.bound_norms(0.25)
    torch.testing.assert_close(row.detach().norm(dim=1), norms + 0.25 * (mean - norms))
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(row.detach(), before), torch.ones(3))
    with torch.no_grad():
        row.mul_(100)
    taught.bound_norms(0.0, limit=2.0)
    torch.testing.assert_close(row.detach().norm(dim=1), (2 * mean).expand(3))
    taught.bound_norms(1.0)
    torch.testing.assert_close(row.detach().norm(dim=1), mean.expand(3))


def test_two_text_encoders_each_have_their_own_rows_and_words() -> None:
    """As SDXL has them, with two tokenizers, and tables of two widths."""
    first, second = FAMILIES.get("sd1").tiny(1), FAMILIES.get("sd2").tiny(2)
    befores = Snapshot(first), Snapshot(second)
    roots = {
        **first.roots,
        "text_encoder_2": second.roots["text_encoder"],
    }
    vocabularies = {
        "text_encoder": first.vocabularies["text_encoder"],
        "text_encoder_2": second.vocabularies["text_encoder"],
    }
    tokens = {
        "<fox>": TokenState(
            {
                "text_encoder": token(first, "<fox>")["<fox>"].vectors["text_encoder"],
                "text_encoder_2": token(second, "<fox>")["<fox>"].vectors["text_encoder"],
            }
        )
    }
    taught = TokenRows("words", roots, vocabularies, tokens, trainable=True).attach()
    for base in (first, second):
        base.encode_prompts(["a <fox>"]).tokens.square().sum().backward()
    assert [name for name, _ in taught.named_parameters()] == ["text_encoder.<fox>", "text_encoder_2.<fox>"]
    assert all(row.grad is not None and bool(row.grad.any()) for row in taught.parameters())
    half = {"<fox>": TokenState({"text_encoder": tokens["<fox>"].vectors["text_encoder"]})}
    with pytest.raises(AdapterError, match=r"rows for text_encoder alone; .* with text_encoder_2 too"):
        TokenRows("half", roots, vocabularies, half)
    taught.eject()
    for before in befores:
        before.check()
    second.vocabularies["text_encoder"].add({"<fox>": 1})
    with pytest.raises(AdapterError, match="in use already"):
        taught.attach()  # refused by the second, so the first must not keep it
    second.vocabularies["text_encoder"].remove(["<fox>"])
    for before in befores:
        before.check()
