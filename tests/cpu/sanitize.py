"""Slow tests of `make sanitize`: csrc/cpu and csrc/host under AddressSanitizer with UndefinedBehaviorSanitizer, and
under ThreadSanitizer. Planted mistakes are to be found.
"""

import pytest

from tests.helpers.sanitized_package import compiled_once

ODD_CALLS, REPLAYS, RACES = "helpers/odd_calls.py", "triton/replays.py", "helpers/racing_indices.py"
# What runs, the source, what it says, the mistake in its place, and what is seen.
MISTAKES = {
    "a sink too many": (
        *(ODD_CALLS, "cpu/inter_sink_bias.cpp"),
        *("op.num_sinks = q.size(2)", "op.num_sinks = q.size(2) + 1", "heap-buffer-overflow"),
    ),
    "offsets unchecked": (
        *(ODD_CALLS, "cpu/index_checks.cpp"),
        *('expect_offsets("cu_seqlens", offsets, offsets.back());', "", "signed integer overflow"),
    ),
    "a signature too long": (
        *(REPLAYS, "host/signature.cpp"),
        *("<Py_ssize_t>(text_.size())", "<Py_ssize_t>(text_.size() + 1000)", "heap-buffer-overflow"),
    ),
}
WITHOUT_GIL = "static long count; auto* state = PyEval_SaveThread(); ++count; PyEval_RestoreThread(state);"
RACES_OF_THREADS = {
    "all tasks by each thread": (
        *(ODD_CALLS, "cpu/inter_sink_bias.cpp"),
        *("{ work(next); }", "{ std::atomic<int64_t> own = 0; work(own); }", "data race"),
    ),
    "one sum of two threads": (
        *(ODD_CALLS, "cpu/lrea_compress.cpp"),
        *("? partials.get() + group * size : nullptr", "? partials.get() : nullptr", "data race"),
    ),
    "a count without the GIL": (
        *(REPLAYS, "host/signature.cpp"),
        *("    Signature signature;\n", f"    Signature signature;\n    {WITHOUT_GIL}\n", "data race"),
    ),
}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    return compiled_once("address", tmp_path_factory)


@pytest.fixture(scope="module")
def thread(tmp_path_factory):
    return compiled_once("thread", tmp_path_factory)


def assert_clean(package, script, *arguments):
    code, said = package.run(script, *arguments)
    assert code == 0 and "Sanitizer" not in said, said


def assert_seen(package, mistake, folder):
    script, source, original, altered, seen = mistake
    code, said = package.with_mistake(folder, source, original, altered).run(script)
    assert code != 0 and seen in said, said


@pytest.mark.parametrize("script", [ODD_CALLS, REPLAYS])
def test_nothing_outside_is_touched_and_nothing_is_undefined(address, script):
    assert_clean(address, script)


def test_indices_that_another_thread_writes_lead_nowhere(address):
    assert_clean(address, RACES, "0.1")
    assert_clean(address, RACES, "0.5", str(address.operators))  # past the public checks


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(address, name, tmp_path):
    assert_seen(address, MISTAKES[name], tmp_path)


def test_no_two_threads_of_an_operator_race(thread):
    assert_clean(thread, ODD_CALLS)


def test_no_two_threads_that_record_and_replay_race(thread):
    assert_clean(thread, REPLAYS, "threads")


@pytest.mark.parametrize("name", RACES_OF_THREADS)
def test_a_race_is_seen(thread, name, tmp_path):
    assert_seen(thread, RACES_OF_THREADS[name], tmp_path)
