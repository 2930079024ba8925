"""metadata.csv and .jsonl: labels, splits and boxes from a table of one's own."""

import json
import unicodedata

import pytest
from test_data import put, rows

import fgssl
import imagesets
from imagesets.errors import UserError


def table(folder, *lines, name="metadata.csv"):
    (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


def read(folder, labels=None):
    return rows(imagesets.read(folder, ".", labels), folder)


@pytest.fixture
def photos(tmp_path):
    return put(tmp_path / "X", "1.jpg", "2.jpg", "deep/3.jpg", "4.jpg", "5.jpg")


def test_a_table_gives_labels_splits_and_boxes(photos):
    table(photos, "file_name,label,split,x,y,width,height", "1.jpg,ash,train,0,0,2,1",
          "2.jpg,oak,Training,0,0,1,1", "deep\\3.jpg,ash,valid,0,1,2,1",
          '4.jpg," oak ",test,0,0,2,2')
    records = imagesets.read(photos, ".")
    assert rows(records, photos) == [
        ("1.jpg", "ash", "train"), ("2.jpg", "oak", "train"), ("deep/3.jpg", "ash", "val"),
        ("4.jpg", "oak", "test")]
    assert records.boxes.tolist() == [[0, 0, 2, 1], [0, 0, 1, 1], [0, 1, 2, 1], [0, 0, 2, 2]]
    assert records.left_out == {"not in the table": 1}, "5.jpg"
    assert records.notes == ("labels are 'label' of X/metadata.csv",)
    assert fgssl.load_data(photos, bbox=True).cached("train", 8).images.shape == (2, 3, 8, 8)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_spreadsheet_of_any_country_is_read(separator, photos):
    """Excel writes semicolons where the comma is in numbers, and a byte order mark."""
    lines = [separator.join(cells) for cells in (
        ("\ufefffile_name", "species", "genus"), ("1.jpg", '"Malus"" x"', "Malus"),
        ("2.jpg", "Pyrus", "Pyrus"), ("", "", ""))]
    table(photos, *lines)
    assert dict(row[:2] for row in read(photos, "species")) == {"1.jpg": 'Malus" x',
                                                                "2.jpg": "Pyrus"}
    assert {name for _, name, _ in read(photos, "genus")} == {"Malus", "Pyrus"}
    with pytest.raises(UserError, match="no column label. Pass --labels with one of species, gen"):
        read(photos)
    with pytest.raises(UserError, match="no labels 'family'. Expected one of species, genus"):
        read(photos, "family")


@pytest.mark.parametrize("text", [
    "File_Name,LABEL\n1.jpg,ash\n2.jpg,oak\n",
    "file_name|label\n1.jpg|ash\n2.jpg|oak\n",
    "sep=;\r\nfile_name;label\r\n1.jpg;ash\r\n2.jpg;oak\r\n",
    "\n\nfile_name,label\n1.jpg,ash\n2.jpg,oak",
    "file_name,label,,\n1.jpg,ash,,\n2.jpg,oak,,,\n,,,\n",
    'file_name, label\n1.jpg, "ash"\n2.jpg, oak'])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_what_spreadsheets_write_is_one_table(text, encoding, photos):
    """Each of these was passed over, or its class was called "ash" with the quotes."""
    (photos / "Metadata.csv").write_bytes(text.encode(encoding))
    assert read(photos) == [(f"{i}.jpg", name, "train") for i, name in ((1, "ash"), (2, "oak"))]


def test_an_absolute_path_may_lead_into_the_folder(photos):
    table(photos, "file_name,label", f"{photos}/deep/3.jpg,ash", "2.jpg,oak")
    assert {path: name for path, name, _ in read(photos)} == {"2.jpg": "oak", "deep/3.jpg": "ash"}


def test_json_lines_of_hugging_face_lie_in_each_split(tmp_path):
    for split, name in (("train", "1.png"), ("test", "2.png")):
        put(tmp_path / "data" / split, name, "a/" + name)
        table(tmp_path / "data" / split, json.dumps({"file_name": name, "label": 3}),
              json.dumps({"file_name": "a/" + name, "label": 10, "text": None}),
              name="metadata.jsonl")
    assert read(tmp_path) == [
        ("data/test/2.png", "3", "test"), ("data/test/a/2.png", "10", "test"),
        ("data/train/1.png", "3", "train"), ("data/train/a/1.png", "10", "train")]
    put(tmp_path / "data", "extra/7.png")
    with pytest.raises(UserError, match="says nothing of the folders beside it"):
        read(tmp_path)


def test_an_empty_label_is_unknown_and_no_label_column_means_none(photos):
    table(photos, "file_name,label,split", "1.jpg,ash,train", "2.jpg,,train", "4.jpg,,val",
          "5.jpg,oak,train")
    assert read(photos)[1] == ("2.jpg", None, "train")
    assert imagesets.read(photos, ".").left_out == {"unlabelled, in val": 1, "not in the table": 1}
    table(photos, "file_name", "1.jpg", "2.jpg")
    assert read(photos) == [("1.jpg", None, "train"), ("2.jpg", None, "train")]


def test_a_table_goes_before_class_folders_and_needs_its_header(tmp_path):
    put(tmp_path, "a/1.jpg", "b/2.jpg")
    table(tmp_path, "isic_id,diagnosis", "1,x")
    assert {name for _, name, _ in read(tmp_path)} == {"a", "b"}, "another metadata.csv"
    note = "metadata.csv is not used: no column file_name among isic_id, diagnosis"
    assert imagesets.read(tmp_path, ".").notes == (note,), "it must not go unnoticed"
    table(tmp_path, "file_name,label", "a/1.jpg,ash", "b/2.jpg,oak")
    assert {name for _, name, _ in read(tmp_path)} == {"ash", "oak"}


@pytest.mark.parametrize("name, text, reason", [
    ("metadata.csv", "filename,label\n1.jpg,ash\n", "no column file_name among filename, label"),
    ("metadata.csv", "", "it has no rows"),
    ("notes/metadata.csv", "file_name,label\n1.jpg,ash\n", "it lies in no folder around all"),
    ("Metadata.xlsx", "PK", "expected one of metadata.csv, metadata.tsv")])
def test_why_a_table_is_not_used_is_said_also_where_the_folder_is_refused(name, text, reason,
                                                                          tmp_path):
    """The message asked for the metadata.csv that was there."""
    put(tmp_path, "images/1.jpg")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"{name} is not used: {reason}"):
        imagesets.read(tmp_path, ".")


def test_names_of_macos_are_found(tmp_path):
    put(tmp_path, unicodedata.normalize("NFD", "Möwe.jpg"), "b.jpg")
    table(tmp_path, "file_name,label", unicodedata.normalize("NFC", "Möwe.jpg,Möwe"), "b.jpg,auk")
    assert imagesets.read(tmp_path, ".").classes == ["Möwe", "auk"]


@pytest.mark.parametrize("lines, problem", [
    (["file_name,label", "1.jpg,ash", "9.jpg,oak"], "no image .*9.jpg, which .*metadata.csv lists"),
    (["file_name,label", "1.jpg,ash", "../X/2.jpg,oak"], "outside"),
    (["file_name,label", "1.jpg,ash", "1.jpg,oak"], "line 3: '1.jpg' is listed twice"),
    (["file_name,label", "1.jpg,ash", "2.jpg"], "line 3: 1 values for 2 columns"),
    (["file_name,label,label", "1.jpg,ash,oak"], "line 1: two columns of one name"),
    (["file_name,label,split", "1.jpg,ash,fold1"], "line 2: cannot use the split 'fold1'"),
    (["file_name,label,split", "1.jpg,ash,train", "2.jpg,oak,"], "for some images only"),
    (["file_name,label,x,y,width,height", "1.jpg,ash,0,0,0,4"], "line 2: cannot use the box"),
    (["file_name,label,x,y,width,height", "1.jpg,ash,0,0,nan,4"], "line 2: cannot use the box"),
    (["file_name,label,x,y,width,height", "1.jpg,ash,0,0,1,1", "2.jpg,oak,,,,"], "for some images"),
    (["file_name,label", '1.jpg,"ash'], "line"),
    (["file_name,label", "1.jpg,ash", "/etc/2.jpg,oak"], "line 3 of .* lists .*outside"),
    (["file_name,label", "1.jpg,ash", "2.jpg,NaN"], "line 3: the label is NaN"),
    (["file_name,label", "notes.txt,ash"], "cannot be read as an image"),
    (["file_name,label", "1.jpg,ash", "2.jpg,Ash"], "one class or two"),
    (["file_name,label", "1.jpg,ash", "2.jpg,ash"], "one class only")])
def test_a_line_that_does_not_fit_is_named(lines, problem, photos):
    (photos / "notes.txt").touch()
    with pytest.raises((UserError, FileNotFoundError), match=problem):
        read(table(photos, *lines))


def test_a_table_in_a_split_may_not_name_another(tmp_path):
    for split in ("train", "test"):
        table(put(tmp_path / split, "1.jpg", "2.jpg"), "file_name,label,split", "1.jpg,ash,train",
              "2.jpg,oak,train")
    with pytest.raises(UserError, match="line 2: the split is train, but the table lies in test"):
        read(tmp_path)


def test_a_label_is_text_in_utf_8(photos):
    """A file of Windows-1252 gave classes whose letters no terminal, picture or CSV could write."""
    (photos / "metadata.csv").write_bytes("file_name,label\n1.jpg,M\xf6we\n".encode("cp1252"))
    with pytest.raises(UserError, match='line 2: the label .* is not in UTF-8: save the table as'):
        read(photos)
    (photos / "metadata.csv").unlink()
    table(photos, '{"file_name": "1.jpg", "label": ["ash"]}', name="metadata.jsonl")
    with pytest.raises(UserError, match=r'line 1: the label is \["ash"\], expected a text'):
        read(photos)
