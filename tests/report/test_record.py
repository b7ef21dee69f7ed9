import json

from herdkern.report.record import finite, read_run, read_stages


def test_stages_keep_journal_order_and_sum_their_tasks(run_dir):
    stages = read_run(run_dir).stages
    assert [stage.name for stage in stages] == ["crawl", "extract", "filter"]
    assert stages[1].docs_in == 500
    assert stages[1].dropped == {"no_text": 30}
    assert stages[2].counters["languages"] == {"en": 396, "de": 4}


def test_a_task_that_ran_again_counts_once(run_dir):
    journal = run_dir / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() * 2)
    assert read_stages(journal)[0].docs_out == 500


def test_a_stage_whose_folder_is_gone_is_left_out(run_dir):
    (run_dir / "data/crawl/task-00000").rmdir()
    (run_dir / "data/crawl").rmdir()
    assert [stage.name for stage in read_run(run_dir).stages] == ["extract", "filter"]


def test_a_torn_last_metrics_line_is_ignored(run_dir):
    assert [row["step"] for row in read_run(run_dir).metrics][-1] == 300


def test_examples_are_grouped_by_reason(run_dir):
    examples = read_run(run_dir).examples["filter"]
    assert len(examples) == 2
    assert all(len(documents) == 3 for documents in examples.values())


def test_tokens_are_counted_per_folder(run_dir):
    by_name = {stats.name: stats for stats in read_run(run_dir).tokens}
    assert set(by_name) == {"train", "heldout"}
    assert by_name["train"].num_tokens == 60 + 900 + 40 + 7000 + 300 + 5 + 80
    assert int(by_name["train"].counts.sum()) == by_name["train"].num_tokens
    assert by_name["train"].lengths.tolist() == [60, 900, 40, 7000, 300, 5, 80]


def test_vocabulary_is_in_rank_order(run_dir):
    assert read_run(run_dir).vocabulary[256:258] == [b"<script>", b" the"]


def test_finite_leaves_out_what_is_no_number():
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"step": 3}, {"step": 4, "loss": "x"}]
    assert finite(rows, "loss") == ([1.0], [2.0])


def test_a_config_that_is_no_object_reads_as_empty(run_dir):
    (run_dir / "config.json").write_text(json.dumps([1]))
    assert read_run(run_dir).config == {}
