"""Who hears of a run: each warning once, progress as it comes, parts by their names."""

from qconv.reporter import Reporter


def test_each_warning_is_passed_on_once_and_kept_in_order():
    heard: list[str] = []
    reporter = Reporter(heard.append)
    for text in ("b", "a", "b"):
        reporter.warn(text)
    assert heard == reporter.warnings == ["b", "a"]


def test_parts_keep_their_own_warnings_and_pass_them_on():
    heard: list[str] = []
    steps: list[tuple[object, ...]] = []
    whole = Reporter(heard.append, lambda *step: steps.append(step))
    first, second = whole.of_part(), whole.of_part("w4a8")
    for part in (first, second, whole.of_part()):
        part.warn("few")
        part.progress("read", 1, 2)
    assert first.warnings == second.warnings == ["few"]
    assert heard == ["few", "w4a8: few"]
    assert steps == [("read", 1, 2)] * 3


def test_without_one_of_both_the_other_goes_on():
    heard: list[object] = []
    whole = Reporter(heard.append, lambda *step: heard.append(step))
    quiet, still = whole.without_warnings(), whole.without_progress()
    for part in (quiet, still):
        part.warn("text")
        part.progress("read", 1, 2)
    assert heard == [("read", 1, 2), "text"]
    assert whole.warnings == ["text"]
    Reporter().progress("read", 1, 2)


def test_each_run_tells_its_warnings():
    """What one run has told is news again in the next, once."""
    heard: list[str] = []
    whole = Reporter(heard.append)
    for run in (whole.of_run(), whole.of_run()):
        run.warn("few")
        run.warn("few")
        run.of_part().warn("few")
        assert run.warnings == ["few"]
    assert heard == whole.warnings == ["few", "few"]
