"""Examples become rows, and rows batches."""

import json
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora.errors import UsageError
from flora.training.data import IGNORED, Example, Row, RowStream, collate, read_examples, tokenize


class Letters:
    """A tokenizer with a token a letter."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": ([1] if add_special_tokens else []) + [ord(c) for c in text]}


def test_a_text_is_cut_into_pieces_that_lose_nothing_but_a_lone_last_token():
    rows = list(tokenize(Example(adapter="a", text="x" * 9), Letters(), 4))
    assert [len(row.tokens) for row in rows] == [4, 4, 2]
    assert rows[0].labels == rows[0].tokens
    assert len(list(tokenize(Example(adapter="a", text="x" * 8), Letters(), 4))) == 2


def test_only_the_completion_is_learned_and_it_ends():
    (row,) = tokenize(Example(adapter="a", prompt="ab", completion="cd"), Letters(), 16)
    assert row.tokens == [1, ord("a"), ord("b"), ord("c"), ord("d"), 0]
    assert row.labels == [IGNORED] * 3 + [ord("c"), ord("d"), 0]


def test_a_prompt_that_fills_the_row_leaves_nothing_to_learn():
    example = Example(adapter="a", prompt="abcdef", completion="g")
    assert list(tokenize(example, Letters(), 4)) == []


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_collate_pads_on_the_right(lengths):
    rows = [Row(adapter=str(n), tokens=[7] * n, labels=[7] * n) for n in lengths]
    batch = collate(rows, pad=3)
    assert batch.input_ids.shape == (len(lengths), max(lengths))
    assert batch.attention_mask.sum(dim=1).tolist() == lengths
    assert (batch.input_ids == 7).sum(dim=1).tolist() == lengths
    assert ((batch.labels == IGNORED) == (batch.attention_mask == 0)).all()


def test_an_adapters_rows_do_not_depend_on_its_neighbours():
    rows = {
        name: [Row(adapter=name, tokens=[i, i], labels=[i, i]) for i in range(5)] for name in "ab"
    }
    both = list(islice(RowStream(rows, 2, seed=1), 7))
    alone = list(islice(RowStream({"b": rows["b"]}, 2, seed=1), 7))
    assert [[r for r in batch if r.adapter == "b"] for batch in both] == alone
    drawn = [row.tokens[0] for batch in alone for row in batch]
    assert sorted(drawn[:5]) == list(range(5))
    assert sorted(drawn[5:10]) == list(range(5))
    assert list(islice(RowStream(rows, 2, seed=2), 7)) != both


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: Expecting"),
        ("[]", "line 2"),
        ('{"adapter": "a"}', "either text, or prompt and completion"),
        ('{"adapter": "a", "text": "x", "prompt": "y", "completion": "z"}', "either text"),
        ('{"adapter": "a", "prompt": "y"}', "either text"),
        ('{"adapter": 3, "text": "x"}', "adapter"),
        ('{"adapter": "a", "text": "x", "tekst": 1}', "tekst"),
    ],
)
def test_a_line_that_does_not_hold_is_named(tmp_path, line, said):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"adapter": "a", "text": "fine"}) + "\n" + line + "\n")
    with pytest.raises(UsageError, match="line 2") as caught:
        read_examples(path)
    assert said in str(caught.value)


def test_no_data_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no data file"):
        read_examples(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UsageError, match="holds no example"):
        read_examples(tmp_path / "empty.jsonl")
    with pytest.raises(UsageError, match="no rows to train on for: b"):
        RowStream({"a": [Row(adapter="a", tokens=[1, 2], labels=[1, 2])], "b": []}, 1, seed=0)
