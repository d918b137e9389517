"""What is read from files, what counts in it, and data that cannot be used."""

import json
import sys

import pytest
from byte_tokenizer import END, byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from moe_runtime.errors import RecipeError, RunError
from moe_runtime.train.data import DataRecipe, sources
from moe_runtime.train.data.load import load_train_data
from moe_runtime.train.data.samples import IGNORED, encode, encode_parts, encode_sample
from moe_runtime.train.data.sources import Reader, Share

INSTRUCTIONS = [
    {"prompt": "Say a: ", "completion": "aaa", "task": "say"},
    {"text": "whole"},
    {"prompt": "p", "completion": "bb"},
]


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def file(tmp_path):
    """`file(content)`: JSON lines of a list, bytes, or text."""

    def write(content, name="data.jsonl"):
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(line) + "\n" for line in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def load(*paths, tokenizer=None, **changes):
    recipe = DataRecipe(train=paths, **({"max_length": 64} | changes))
    return load_train_data(recipe, tokenizer or byte_tokenizer(), 0)


ALL = Share()


def read(*paths, share=ALL, **changes):
    recipe = DataRecipe(train=paths, **({"max_length": 64} | changes))
    return list(Reader(recipe, byte_tokenizer()).samples(paths, share))


def spoken(sample):
    return byte_tokenizer().decode([label for label in sample.labels_L.tolist() if label != IGNORED])


def words(sample):
    return byte_tokenizer().decode(sample.ids_L)


def test_completions_and_texts_count_with_their_end(file):
    samples = [sample for _, sample in read(file(INSTRUCTIONS))]
    assert [words(sample) for sample in samples] == ["Say a: aaa<end>", "whole<end>", "pbb<end>"]
    assert [spoken(sample) for sample in samples] == ["aaa<end>", "whole<end>", "bb<end>"]
    everything = [sample for _, sample in read(file(INSTRUCTIONS), loss="all")]
    assert [spoken(sample) for sample in everything] == [words(sample) for sample in everything]
    assert samples[0].ids_L[-1] == END


def blank_tokenizer():
    """Of single characters; every text that it is given begins with a blank."""
    letters = [chr(code) for code in range(33, 127)] + ["\n", "\N{LOWER ONE EIGHTH BLOCK}", "<end>"]
    model = models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=CHAT)


CHAT = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
QUESTION = {"role": "user", "content": "hi you"}
ANSWER = {"role": "assistant", "content": " yes?"}


@pytest.mark.parametrize(
    ("values", "whole", "counted"),
    [
        ({"prompt": "def f:\n", "completion": "    return"}, "def f:\n    return", "    return<end>"),
        (
            {"messages": [QUESTION, ANSWER, QUESTION, ANSWER, QUESTION]},
            "[user]hi you\n[assistant] yes?\n" * 2,
            " yes?\n yes?\n",
        ),
        ({"text": "a b"}, "a b", " a b<end>"),
    ],
)
def test_a_sample_is_tokenized_as_a_whole(values, whole, counted):
    tokenizer = blank_tokenizer()
    ids, counts = encode_sample("here", values, tokenizer)
    end = [] if "messages" in values else [tokenizer.eos_token_id]
    assert ids == tokenizer(whole)["input_ids"] + end
    said = tokenizer.convert_ids_to_tokens([i for i, count in zip(ids, counts, strict=True) if count])
    assert "".join(said).replace("\N{LOWER ONE EIGHTH BLOCK}", " ") == counted


def test_slow_tokenizers_take_parts_one_by_one(tokenizer, monkeypatch):
    texts = ["Say \N{SNOWMAN}: ", "a", "", "bc"]
    expected = encode_parts(tokenizer, texts, more=False)
    assert expected[1] == [0] * 9 + [1] + [3, 3]
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert encode_parts(tokenizer, texts, more=False) == expected


def test_a_tokenizers_own_end_comes_once(tokenizer):
    ends = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", END)])
    tokenizer.backend_tokenizer.post_processor = ends
    ids, counts = encode_sample("here", {"prompt": "p", "completion": "c"}, tokenizer)
    assert (tokenizer.decode(ids), counts) == ("pc<end>", [False, True, True])
    assert tokenizer.decode(encode(tokenizer, "p", more=False)) == "p"


def test_padding_is_the_end_where_there_is_no_other(file, tokenizer):
    path = file([{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "cc"}])
    for pad, expected in ((None, END), ("p", tokenizer.convert_tokens_to_ids("p"))):
        tokenizer.pad_token = pad
        data = load(path, packing=False, tokenizer=tokenizer)
        batch = data.collator([data.dataset[0], data.dataset[1]])
        assert batch["input_ids"][0].tolist()[3:] == [expected]


def test_a_byte_order_mark_is_no_text(file):
    mark = b"\xef\xbb\xbf"
    assert [words(sample) for _, sample in read(file(mark + b'{"text": "abc"}\n'))] == ["abc<end>"]
    assert [words(sample) for _, sample in read(file(mark + b"abc", "a.txt"))] == ["abc"]


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson"])
def test_other_endings_of_lines(name, file):
    assert [words(sample) for _, sample in read(file(INSTRUCTIONS[1:2], name))] == ["whole<end>"]


def test_numbers_go_on_over_files_and_count_what_is_left_out(file):
    first = file([{"prompt": "p" * 99, "completion": "c"}, *INSTRUCTIONS], "a.jsonl")
    second = file(INSTRUCTIONS[:1], "b.jsonl")
    assert [number for number, _ in read(first, second, too_long="drop")] == [1, 2, 3, 4]
    assert [n for n, _ in read(first, second, too_long="drop", share=Share(1, 2))] == [1, 3]
    assert [n for n, _ in read(first, second, too_long="drop", share=Share(0, 2))] == [2, 4]


def test_a_long_text_is_read_in_pieces_into_full_blocks(file, monkeypatch):
    monkeypatch.setattr(sources, "_PIECE_CHARACTERS", 500)
    text = "".join(f"line {number}\n" for number in range(900))
    samples = [sample for _, sample in read(file(text, "long.txt"), max_length=1000)]
    assert {len(sample.ids_L) for sample in samples[:-1]} == {1000}
    assert "".join(words(sample) for sample in samples) == text


def test_what_is_too_long_is_refused_cut_or_dropped_and_counted(file):
    path = file(
        [{"prompt": "p", "completion": "c" * 9}, {"prompt": "p" * 9, "completion": "c"}, INSTRUCTIONS[2]]
    )
    with pytest.raises(
        RunError,
        match=r"data.jsonl, line 1: has 11 tokens, more than data.max_length \(8\); raise it, or say",
    ):
        load(path, max_length=8)
    cut = load(path, max_length=8, too_long="cut").summary
    assert {name: cut[name] for name in ("samples", "tokens", "counted_tokens")} == {
        "samples": 2,
        "tokens": 12,
        "counted_tokens": 10,
    }
    # the second is cut to nothing but its prompt
    assert (cut["cut"], cut["cut_tokens"], cut["dropped"], cut["nothing_counts"]) == (2, 6, 0, 1)
    dropped = load(path, max_length=8, too_long="drop").summary
    assert (dropped["samples"], dropped["dropped"], dropped["cut"]) == (1, 2, 0)


def test_the_summary_names_files_and_evaluation_sets(file):
    train, held = file(INSTRUCTIONS, "train.jsonl"), file(INSTRUCTIONS[:1], "held.jsonl")
    data = load(train, eval=(held, f"again={held}"))
    assert list(data.eval) == list(data.summary["eval"]) == ["held", "again"]
    assert data.summary["files"][0]["path"] == train
    assert data.summary["files"][0]["sha256"] != data.summary["eval"]["held"]["files"][0]["sha256"]
    assert (data.summary["rows"], data.summary["row_fill"]) == (1, (11 + 6 + 4) / 64)
    assert len(data.eval["held"]) == 1


@pytest.mark.parametrize(
    ("content", "name", "sentence"),
    [
        ("", "data.jsonl", "data.jsonl is empty"),
        (" \n ", "data.txt", "data.txt is empty"),
        (b"\xff\xfe\xff", "data.txt", "data.txt cannot be read as UTF-8 text"),
        (b'{"text": "ab"}\n{"text": "\xff"}', "data.jsonl", "line 2: must be UTF-8 text, .* byte 10 of the"),
        ('{"text": "ab"}\n\n{"text"', "data.jsonl", "data.jsonl, line 3: must be one JSON object"),
        ([3], "data.jsonl", "line 1: must be one JSON object, got int"),
        ([{"text": "ab"}, {"prompt": "a"}], "data.jsonl", "line 2: must have 'prompt' and 'completion'"),
        ([{"prompt": "a", "text": "b"}], "data.jsonl", "and one of these only, got 'prompt', 'text'"),
        ([{"prompt": "a", "completion": ["b"], "text": "c"}], "data.jsonl", "'completion', 'text'"),
        ([{"text": "a", "messages": [QUESTION]}], "data.jsonl", "only, got 'text', 'messages'"),
        ([{"prompt": "a", "completion": ["b"]}], "data.jsonl", "line 1: must have 'prompt'"),
        ([{"text": "ab"}, {"text": "a\ud800b"}], "data.jsonl", r"line 2: must be text .* '\\ud800'"),
        ([{"messages": []}], "data.jsonl", "line 1: 'messages' must be one or more, got none"),
        (
            "[]",
            "data.json",
            r"data.json must be JSON lines \(.jsonl or .ndjson\), .* a .json file is not read",
        ),
        (b"\x1f\x8b", "data.jsonl.GZ", "and a .gz file is not read; write one JSON object per line"),
        ([{"messages": [QUESTION]}], "data.jsonl", "need a chat template"),
        ([{"prompt": "ab", "completion": ""}], "none.jsonl", None),
    ],
)
def test_files_that_cannot_be_used(content, name, sentence, file):
    if sentence is None:  # only the end counts
        assert load(file(content, name)).summary["counted_tokens"] == 1
        return
    with pytest.raises(RunError, match=sentence):
        load(file(content, name))


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        (
            [{"role": "tool", "content": "a"}, ANSWER],
            "line 1: the chat template refuses the messages: no tools",
        ),
        ([ANSWER, QUESTION], "line 1: 'messages' must begin with another role than 'assistant'"),
    ],
)
def test_conversations_that_cannot_be_used(messages, sentence, file, tokenizer):
    tokenizer.chat_template = CHAT
    with pytest.raises(RunError, match=sentence):
        load(file([{"messages": messages}]), tokenizer=tokenizer)


def test_data_of_which_nothing_counts_is_refused(file, tokenizer):
    path = file([{"prompt": "p" * 70, "completion": "c"}])
    sentence = r"tokens that count within data.max_length \(64\), got none in .*data.jsonl"
    with pytest.raises(RunError, match=sentence):
        load(path, too_long="cut")
    with pytest.raises(RunError, match=r"there is no file nowhere\.jsonl"):
        load("nowhere.jsonl")
    with pytest.raises(RunError, match=r"there is no file nowhere\.jsonl"):
        load("nowhere.jsonl", streaming=True)
    with pytest.raises(RunError, match=r"data\.max_length must be at most 32, which the model takes, got 64"):
        load_train_data(DataRecipe(train=(path,), max_length=64), tokenizer, 0, model_max_length=32)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"train": ()}, "data.train must name one or more files, got none"),
        ({"train": "a.txt"}, "data.train must be a list, got 'a.txt'"),
        ({"train": ("a",), "max_length": 1}, "data.max_length must be at least 2, got 1"),
        ({"train": ("a",), "too_long": "split"}, "data.too_long must be one of 'refuse', 'cut', 'drop', got"),
        ({"train": ("a",), "loss": "prompt"}, "data.loss must be one of 'completion', 'all', got 'prompt'"),
        ({"train": ("a",), "packing": 1}, "data.packing must be true or false, got 1"),
        ({"train": ("a",), "eval": ("x/b.txt", "y/b.txt")}, "once, got 'b' twice; write NAME=y/b.txt to"),
    ],
)
def test_recipes_that_are_refused(values, sentence):
    with pytest.raises(RecipeError, match=sentence):
        DataRecipe(**values)


# --- datasets ---


def test_folders_and_tables_of_datasets(tmp_path, file):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_list(
        [{"prompt": line["prompt"], "completion": "c"} for line in INSTRUCTIONS[::2]]
    )
    table.save_to_disk(str(tmp_path / "folder"))
    table.to_parquet(str(tmp_path / "table.parquet"))
    arrow = next((tmp_path / "folder").glob("*.arrow"))
    for path in (tmp_path / "folder", tmp_path / "table.parquet", arrow):
        assert [words(sample) for _, sample in read(str(path))] == ["Say a: c<end>", "pc<end>"]
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "splits"))
    sentence = r"must hold one set, and has the splits train; name one of them, such as .*splits/train"
    with pytest.raises(RunError, match=sentence):
        read(str(tmp_path / "splits"))
    assert len(read(str(tmp_path / "splits" / "train"))) == 2
    (tmp_path / "other").mkdir()
    with pytest.raises(RunError, match="other cannot be read: "):
        read(str(tmp_path / "other"))
    datasets.Dataset.from_list([{"text": "a"}, {"text": "abc"}]).save_to_disk(str(tmp_path / "long"))
    with pytest.raises(RunError, match=r"long, row 1: has 4 tokens"):
        read(str(tmp_path / "long"), max_length=3)


def test_without_datasets_the_way_to_install_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match=r"folder needs datasets; run: pip install 'moe-runtime\[train\]'"):
        read(str(tmp_path / "folder"))
