"""Input that is in another form than ours: Parquet, damaged files in a folder, other encodings."""

import gzip
import json
import os
import sys

import pytest

from twelve.data.corpus import tokenize
from twelve.data.encoding import looks_like
from twelve.data.reader import Report, read_documents, read_objects
from twelve.errors import InputError

KOREAN = "나는 오늘 학교에서 수학을 배웠다.\n그리고 12권의 책을 읽었다.\n"
TALK = [{"role": "user", "content": "몇?"}, {"role": "assistant", "content": "2", "reasoning_content": "1+1"}]


def texts(*paths, report=None):
    return [document.text for document in read_documents(paths, report)]


# --- Parquet ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def parquet():
    """Writes columns into a file of small row groups."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (pip install 'twelve[parquet]')")
    from pyarrow import parquet

    def write(path, **columns):
        parquet.write_table(pyarrow.table(columns), path, row_group_size=3)
        return path

    return write


def test_parquet_is_read_row_by_row(tmp_path, parquet):
    lines = [f"{KOREAN}{n}" for n in range(10)]
    path = parquet(tmp_path / "train-00000-of-00002.parquet", text=lines, id=list(range(10)), url=["x"] * 10)
    report = Report()
    documents = list(read_documents([tmp_path], report))
    assert [document.text for document in documents] == lines
    assert documents[4].source == f"{path}:5" and documents[4].about == {"id": 4}
    assert report.position == report.size == path.stat().st_size
    assert next(row for _, row in read_objects(path)) == {"text": f"{KOREAN}0", "id": 0, "url": "x"}


def test_parquet_with_conversations(tmp_path, parquet, tokenizer):
    path = parquet(tmp_path / "a.parquet", messages=[TALK, TALK])
    assert [document.messages for document in read_documents([path])] == [TALK, TALK]
    assert tokenize([path], tmp_path / "out", tokenizer, progress=False)["documents"] == 2


def test_parquet_needs_text_or_messages(tmp_path, parquet):
    path = parquet(tmp_path / "a.parquet", question=["x"], answer=["y"])
    with pytest.raises(InputError, match=r"a.parquet: no column `text` or `messages`, only question, answer"):
        texts(path)
    path = parquet(tmp_path / "b.parquet", text=["x", None])
    with pytest.raises(InputError, match="b.parquet:2: `text` is NoneType, not text"):
        texts(path)
    path = parquet(tmp_path / "c.parquet", text=[1, 2])
    with pytest.raises(InputError, match="c.parquet:1: `text` is int, not text"):
        texts(path)


def test_a_damaged_parquet(tmp_path, parquet):
    path = parquet(tmp_path / "a.parquet", text=[KOREAN] * 99)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="a.parquet is damaged or no Parquet file") as error:
        texts(path)
    assert "\n" not in str(error.value)
    (tmp_path / "b.txt").write_text(KOREAN)
    report = Report()
    assert texts(tmp_path, report=report) == [KOREAN] and report.damaged == [str(path)]


def test_a_parquet_that_is_damaged_in_its_middle(tmp_path, parquet):
    path = parquet(tmp_path / "a.parquet", text=[f"{KOREAN}{number}" for number in range(2000)])
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(2048) + content[middle + 2048 :])
    (tmp_path / "b.txt").write_text(KOREAN)
    report = Report()
    assert texts(tmp_path, report=report) == [KOREAN] and report.damaged == [str(path)]


def test_parquet_whose_text_is_no_utf_8(tmp_path, parquet):
    import pyarrow

    column = pyarrow.array([b"caf\xe9", b"x"]).view(pyarrow.string())
    path = parquet(tmp_path / "a.parquet", text=column)
    with pytest.raises(InputError, match="a.parquet is damaged or no Parquet file .*UTF8"):
        texts(path)


def test_parquet_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for path in (tmp_path, tmp_path / "a.parquet"):
        with pytest.raises(InputError, match=r"a.parquet: .* needs a package: pip install 'twelve\[parquet\]'"):
            texts(path)


# --- damaged files ----------------------------------------------------------------------------------------------------


def test_damaged_files_of_a_folder_are_skipped_and_named(tmp_path, tokenizer, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    good = gzip.compress(KOREAN.encode() * 50)
    (folder / "a.txt.gz").write_bytes(good)
    (folder / "b.txt.gz").write_bytes(good[: len(good) // 2])
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "c"}).encode())[:-3] + b"xyz")
    (folder / "d.txt").write_text("d")
    report = Report()
    assert texts(folder, report=report) == [KOREAN * 50, "d"]
    assert report.damaged == [str(folder / "b.txt.gz"), str(folder / "c.jsonl.gz")]
    assert report.position == report.size
    made = tokenize([folder], tmp_path / "out", tokenizer)
    assert made["documents"] == 2 and made["damaged"] == report.damaged
    assert f"skipped 2 damaged files: {folder / 'b.txt.gz'}, {folder / 'c.jsonl.gz'}" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes only there")
def test_a_name_that_is_no_utf_8(tmp_path):
    with open(os.fsencode(tmp_path) + "/한국어.txt".encode("cp949"), "w") as file:
        file.write(KOREAN)
    with pytest.raises(InputError, match=r"xc7.*a file's name must be UTF-8: rename it"):
        texts(tmp_path)


def test_a_damaged_file_that_was_named_is_an_error(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(KOREAN.encode())[:-9])
    (tmp_path / "b.txt").write_text("b")
    for paths in ([tmp_path / "a.txt.gz"], [tmp_path, tmp_path / "a.txt.gz"]):
        with pytest.raises(InputError, match="a.txt.gz is damaged or cut short"):
            texts(*paths)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(InputError, match="the corpus is empty; damaged: .*a.txt.gz"):
        texts(tmp_path)


# --- other encodings --------------------------------------------------------------------------------------------------

JAPANESE = "今日は学校で数学を勉強しました。それから本を十二冊読みました。" * 5


@pytest.mark.parametrize(
    ("encoding", "text", "told"),
    [
        ("cp949", KOREAN * 20, "looks like CP949: convert it (iconv -f cp949 -t utf-8)"),
        ("euc-kr", KOREAN, "looks like CP949"),
        ("utf-16", KOREAN * 20, "looks like UTF-16: convert it (iconv -f utf-16 -t utf-8)"),
        ("shift-jis", JAPANESE, "if it is text, convert it from its encoding"),
        ("euc-jp", JAPANESE, "if it is text, convert it from its encoding"),
        ("gb18030", "今天我在学校学了数学，然后读了十二本书。" * 9, "if it is text, convert it from its encoding"),
        ("koi8-r", "Сегодня в школе я учил математику и прочитал двенадцать книг. " * 9, "if it is text, convert it"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_another_encoding_is_named_only_where_it_is_sure(tmp_path, encoding, text, told, name):
    rows = text if name == "a.txt" else "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for _ in range(9))
    (tmp_path / name).write_bytes(rows.encode(encoding))
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(InputError) as error:
            texts(path)
        message = str(error.value)
        assert told in message or (name == "a.jsonl" and "not a line of JSON" in message), message
        assert message.startswith(str(tmp_path / name)) and "\n" not in message


def test_a_cut_character_does_not_hide_an_encoding():
    data = (KOREAN * 20).encode("cp949")
    assert looks_like(data)[0] == looks_like(data[:-3])[0] == "CP949"
    assert looks_like(data[: data.index("학교".encode("cp949")) + 1])[0] == "CP949"
    assert looks_like(b"plain") is None and looks_like(bytes(range(128, 256)) * 9) is None


def test_latin_1_among_english_is_counted_not_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes("A café in the old town. ".encode("latin-1") * 20)
    report = Report()
    assert texts(tmp_path, report=report) == ["A caf in the old town. " * 20] and report.bad_bytes == 20
