import pathlib
import tempfile
from html import parser

from absl.testing import absltest

from kimi_jax.analysis.report import FIGURES, write_report
from tests.analysis import fake_run

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class _Tags(parser.HTMLParser):
    """Collects pictures, and the text inside each kind of tag."""

    def __init__(self):
        super().__init__()
        self.images, self.text, self._open = [], {}, []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        elif tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, tag

    def handle_data(self, data):
        for tag in self._open:
            self.text[tag] = self.text.get(tag, "") + data


def _parse(page):
    tags = _Tags()
    tags.feed(page.read_text())
    return tags


class ReportTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.workdir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def _check_pictures(self, page):
        for name, _, _ in FIGURES:
            content = (page.parent / f"{name}.png").read_bytes()
            self.assertTrue(content.startswith(_PNG_SIGNATURE))
            self.assertGreater(len(content), 2000)

    def test_a_finished_run_gets_every_picture_and_both_texts(self):
        fake_run.write_run(self.workdir)
        page = write_report(self.workdir)
        self.assertEqual(page, self.workdir / "report" / "index.html")
        self._check_pictures(page)
        self.assertEqual(_parse(page).images, [f"{name}.png" for name, _, _ in FIGURES])
        markdown = (page.parent / "report.md").read_text()
        for name, _, _ in FIGURES:
            self.assertIn(f"({name}.png)", markdown)

    def test_a_run_that_has_just_begun_gets_a_report_too(self):
        fake_run.write_lines(
            self.workdir / "metrics.jsonl", [{"step": 0, "seconds": 1.0, "loss/train": 6.2}]
        )
        page = write_report(self.workdir)
        self._check_pictures(page)
        self.assertNotIn("Sample", _parse(page).text["body"])

    def test_the_table_puts_bits_per_byte_beside_byte_entropy_and_gzip(self):
        fake_run.write_run(self.workdir)
        page = write_report(self.workdir)
        table = _parse(page).text["table"]
        positions = [table.index(text) for text in ("1.7123", "4.8341", "3.0256")]
        self.assertEqual(positions, sorted(positions))
        for text in ("12,345,678", "409,600", "1:02:03", "platform", "cpu"):
            self.assertIn(text, table)
            self.assertIn(text, (page.parent / "report.md").read_text())

    def test_the_sample_is_shown_as_text_whatever_it_contains(self):
        fake_run.write_run(self.workdir)
        page = write_report(self.workdir)
        self.assertIn("The <b>king & queen </pre>\nwent | home.", _parse(page).text["pre"])

    def test_the_configuration_is_shown(self):
        fake_run.write_run(self.workdir)
        page = write_report(self.workdir)
        self.assertIn('"qk_clip_threshold": 100.0', _parse(page).text["pre"])


if __name__ == "__main__":
    absltest.main()
