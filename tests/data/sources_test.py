import gzip
import json
import pathlib
import sys
import sysconfig
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized

from kimi_jax.configs.data import SourceConfig, SourceKind
from kimi_jax.core.errors import DataError
from kimi_jax.data.sources import read_documents, source_files


class FolderTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def write(self, name, content):
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    def read(self, kind, path=None, **options):
        source = SourceConfig(kind=kind, path=str(path or self.folder), **options)
        return list(read_documents(source, "data.sources.mine"))

    def error(self, kind, path=None, **options):
        with self.assertRaises(DataError) as caught:
            self.read(kind, path, **options)
        return str(caught.exception)


class TextTest(FolderTest):
    def test_folder_gives_one_document_per_file_in_order_of_names(self):
        self.write("b.txt", "bé\r\n")
        self.write("a/z.py", "x = 1")
        self.write("a/empty.py", "")
        self.write("a/picture.png", b"\xff")
        self.write(".git/hidden.txt", "no")
        documents = self.read(SourceKind.TEXT)
        self.assertEqual(documents, [("a/z.py", "x = 1", 5), ("b.txt", "bé\r\n", 5)])

    def test_suffixes_choose_the_files_of_a_folder(self):
        self.write("a.py", "a")
        self.write("b.weird", "b")
        self.assertEqual(self.read(SourceKind.TEXT, suffixes=(".weird",)), [("b.weird", "b", 1)])

    def test_single_file_and_glob_are_read_whatever_their_suffix(self):
        one = self.write("one.weird", "1")
        self.write("sub/two.weird", "2")
        self.assertEqual(self.read(SourceKind.TEXT, one), [("one.weird", "1", 1)])
        found = self.read(SourceKind.TEXT, self.folder / "**" / "*.weird")
        self.assertEqual([text for _, text, _ in found], ["1", "2"])

    def test_invalid_utf8_names_file_line_and_byte(self):
        self.write("bad.txt", b"good\nline \xff\n")
        message = self.error(SourceKind.TEXT)
        self.assertIn(f"{self.folder}/bad.txt is not valid UTF-8", message)
        self.assertIn("byte 0xff at offset 10, line 2", message)

    def test_missing_path_and_folder_without_files_name_the_option(self):
        message = self.error(SourceKind.TEXT, self.folder / "absent")
        self.assertIn("data.sources.mine.path", message)
        self.assertIn("absent", message)
        self.assertIn("has no file that ends in .txt", self.error(SourceKind.TEXT))

    def test_unreadable_file_names_it(self):
        file = self.write("a.txt", "a")
        denied = PermissionError(13, "Permission denied", str(file))
        with mock.patch.object(pathlib.Path, "read_bytes", side_effect=denied):
            message = self.error(SourceKind.TEXT, file)
        self.assertIn(f"data.sources.mine.path: cannot read {file}", message)


class JsonlTest(FolderTest):
    def test_plain_and_gzip_files_give_the_same_documents(self):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "zwö", ""))
        self.write("a.jsonl", lines + "\n")
        self.write("b.jsonl.gz", gzip.compress(lines.encode()))
        documents = self.read(SourceKind.JSONL)
        self.assertEqual([d.name for d in documents], [
            "a.jsonl:1", "a.jsonl:2", "b.jsonl.gz:1", "b.jsonl.gz:2",
        ])  # fmt: skip
        self.assertEqual([d.text for d in documents], ["one", "zwö"] * 2)
        self.assertEqual([d.num_bytes for d in documents], [3, 4] * 2)

    @parameterized.parameters(
        (b'{"text": "open', "is not valid JSON"),
        (b"[1]", "is a JSON list; it must be an object"),
        (b'{"body": "x", "id": 1}', "has no field 'text', only 'body', 'id'"),
        (b'{"text": 3}', "field 'text' is int, not a string"),
        (b'{"text": "\\ud800"}', "is not valid Unicode"),
        (b'{"text": "\xff"}', "is not valid UTF-8"),
    )
    def test_malformed_line_is_named_with_its_number(self, line, message):
        file = self.write("a.jsonl", b'{"text": "good"}\n\n' + line + b"\n")
        got = self.error(SourceKind.JSONL)
        self.assertIn(f"{file} line 3", got)
        self.assertIn(message, got)

    def test_missing_field_names_the_option_that_chooses_it(self):
        self.write("a.jsonl", '{"body": "x"}')
        self.assertIn("set data.sources.mine.text_field", self.error(SourceKind.JSONL))
        self.assertEqual(self.read(SourceKind.JSONL, text_field="body"), [("a.jsonl:1", "x", 1)])

    def test_broken_gzip_file_is_named(self):
        whole = gzip.compress(b'{"text": "x"}\n' * 1000)
        cut = self.write("cut.jsonl.gz", whole[:-20])
        self.assertIn(f"{cut} is not a whole gzip file", self.error(SourceKind.JSONL, cut))
        plain = self.write("plain.jsonl.gz", b'{"text": "x"}\n')
        self.assertIn(f"{plain} is not a whole gzip file", self.error(SourceKind.JSONL, plain))

    def test_file_of_another_kind_is_refused(self):
        file = self.write("a.csv", "text\nx\n")
        message = self.error(SourceKind.JSONL, file)
        self.assertIn("a.csv does not end in .jsonl or .jsonl.gz", message)
        self.assertIn("data.sources.mine.kind", message)


class ParquetTest(FolderTest):
    def write_table(self, name, columns):
        import pyarrow
        from pyarrow import parquet

        file = self.folder / name
        parquet.write_table(pyarrow.table(columns), file, row_group_size=2)
        return file

    def test_each_row_is_a_document(self):
        self.write_table("a.parquet", {"text": ["one", "", "drei"], "id": [1, 2, 3]})
        self.assertEqual(
            self.read(SourceKind.PARQUET), [("a.parquet:1", "one", 3), ("a.parquet:3", "drei", 4)]
        )

    def test_missing_column_names_those_that_exist(self):
        self.write_table("a.parquet", {"body": ["one"], "id": [1]})
        message = self.error(SourceKind.PARQUET)
        self.assertIn("a.parquet has no column 'text', only 'body', 'id'", message)
        self.assertIn("data.sources.mine.text_field", message)

    def test_value_that_is_no_text_names_its_row(self):
        file = self.write_table("a.parquet", {"text": ["one", None]})
        self.assertIn(f"{file} row 2: field 'text' is NoneType", self.error(SourceKind.PARQUET))

    def test_malformed_file_is_named(self):
        file = self.write("a.parquet", "not parquet")
        self.assertIn(f"{file} is malformed", self.error(SourceKind.PARQUET))


class ArrayRecordTest(FolderTest):
    def write_records(self, name, records):
        from array_record.python.array_record_module import ArrayRecordWriter

        file = self.folder / name
        writer = ArrayRecordWriter(str(file), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        return file

    def test_each_record_is_a_document(self):
        self.write_records("a.array_record", [b"eins", "zwö".encode()])
        self.assertEqual(
            self.read(SourceKind.ARRAY_RECORD),
            [("a.array_record:1", "eins", 4), ("a.array_record:2", "zwö", 4)],
        )

    def test_record_that_is_not_utf8_is_named(self):
        file = self.write_records("a.array_record", [b"good", b"\xfe"])
        self.assertIn(f"{file} record 2 is not valid UTF-8", self.error(SourceKind.ARRAY_RECORD))

    def test_malformed_file_is_named(self):
        file = self.write("a.array_record", b"nothing" * 100)
        self.assertIn(f"{file} is not a readable ArrayRecord", self.error(SourceKind.ARRAY_RECORD))


class EmbeddedTest(FolderTest):
    def read_embedded(self):
        return list(read_documents(SourceConfig(), "data.sources.embedded"))

    def test_holds_the_standard_library_and_the_documentation_topics(self):
        from pydoc_data.topics import topics

        documents = {document.name: document.text for document in self.read_embedded()}
        import json.decoder

        source = pathlib.Path(json.decoder.__file__).read_bytes().decode()
        self.assertEqual(documents["python/json/decoder.py"], source)
        self.assertEqual(documents["topics/assert"], topics["assert"])
        self.assertGreater(len(documents), 500)
        self.assertFalse([name for name in documents if "-packages" in name])
        # The topics' source file would show held-out topics to training.
        self.assertNotIn("python/pydoc_data/topics.py", documents)

    def test_library_without_tests_and_with_files_that_are_not_utf8_is_read(self):
        self.write("os.py", "import sys")
        self.write("bad.py", b"# \xff")
        self.write("site-packages/mine.py", "x")
        with mock.patch.object(sysconfig, "get_path", return_value=str(self.folder)):
            documents = self.read_embedded()
        names = [document.name for document in documents]
        self.assertEqual([name for name in names if name.startswith("python/")], ["python/os.py"])

    def test_library_without_topics_is_read(self):
        self.write("os.py", "import sys")
        with (
            mock.patch.object(sysconfig, "get_path", return_value=str(self.folder)),
            mock.patch("importlib.util.find_spec", return_value=None),
        ):
            self.assertEqual(self.read_embedded(), [("python/os.py", "import sys", 10)])

    def test_files_are_those_of_the_running_python(self):
        (first, *_) = source_files(SourceConfig(), "data.sources.embedded")
        self.assertIn(f"python{sys.version_info.major}.{sys.version_info.minor}", str(first))


if __name__ == "__main__":
    absltest.main()
