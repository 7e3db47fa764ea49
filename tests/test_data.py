"""The prepare.py of the five official benchmarks on small files in the official form, and the scores of their rows."""
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

import eval as evaluation
import iv3
import mcr_agent
from m2la import UserError

DATA = Path(__file__).parents[1] / "data"


def load(name):
    spec = importlib.util.spec_from_file_location(f"{name}_prepare", DATA / name / "prepare.py")
    module = sys.modules[f"{name}_prepare"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = ("videomme", "mlvu", "egoschema", "lvbench", "charades_sta")
MODULES = {name: load(name) for name in NAMES}
official = sys.modules["official"]


def clip(path, seconds=4, side=32):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = side
        for i in range(4 * seconds):
            image = np.full((side, side, 3), 10 * i, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write(path, data):
    """`data` as JSON, as JSONL where the name says so, or as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    path.write_text(data if isinstance(data, str) else "\n".join(map(json.dumps, data)) if lines else json.dumps(data))
    return path


def prepared(name, annotations, folder, preset="default", **more):
    """The rows that iv3.load_rows reads; the lines of flawed.txt and missing.txt."""
    (folder / "media").mkdir(exist_ok=True)
    module, out = MODULES[name], folder / "out"
    official.prepare(name, 9, module.OURS, module.AUTHORS, module.convert, annotations, folder / "media", out, preset,
                     **more)
    lists = [(out / f"{file}.txt").read_text().splitlines() for file in ("flawed", "missing")]
    return iv3.load_rows(out / f"{name}.jsonl"), *lists


def asked(row):
    (video, text), reply = row["messages"][0]["content"], row["messages"][1]["content"]
    return video, text["text"], reply


# ---- Video-MME ------------------------------------------------------------------------------------------------------

MME = {"video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Law", "url": "https://…",
       "videoID": "ab-C_1", "question_id": "001-1", "task_type": "OCR Problems", "question": "What {is} it?",
       "options": ["A. One.", "B. Two.", "C. A dog.", "D. Four."], "answer": "C"}


def test_videomme_rows(tmp_path):
    clip(tmp_path / "media" / "deep" / "ab-C_1.mkv")
    gone = {**MME, "videoID": "gone", "question_id": "002-1", "options": ["One.", "Two.", "Three.", "Four."]}
    rows, flawed, missing = prepared("videomme", write(tmp_path / "mme.json", [MME, gone]), tmp_path)
    video, text, reply = asked(rows[0])
    assert text == ("Select the best answer to the following multiple-choice question based on the video. Respond with "
                    "only the letter (A, B, C, or D) of the correct option.\nWhat {is} it?\n"
                    "A. One.\nB. Two.\nC. A dog.\nD. Four.\nThe best answer is:")
    assert video == {"type": "video", "video": "../media/deep/ab-C_1.mkv", "fps": 2, "max_frames": 768}
    assert rows[0]["options"] == ["One.", "Two.", "A dog.", "Four."] and (rows[0]["answer"], reply) == ("C", "C")
    assert rows[0]["groups"] == {"duration": "short", "domain": "Knowledge", "sub_category": "Law",
                                 "task_type": "OCR Problems"}
    assert "One." in asked(rows[1])[1] and "A. One." in asked(rows[1])[1]                    # bare options get letters
    assert not flawed and missing == [f"{tmp_path / 'media' / 'gone.mp4'}: 1 rows"]          # kept, and listed


def test_videomme_nested_and_line_by_line(tmp_path):
    flat = [MME, {**MME, "question_id": "001-2", "answer": "A"}]
    per_question = ("question_id", "task_type", "question", "options", "answer")
    nested = [{**{k: v for k, v in MME.items() if k not in per_question},
               "questions": [{**{k: q[k] for k in per_question}, "response": "C"} for q in flat]}]
    want = prepared("videomme", write(tmp_path / "flat.json", flat), tmp_path)[0]
    assert len(want) == 2
    assert prepared("videomme", write(tmp_path / "nested.json", nested), tmp_path)[0] == want
    assert prepared("videomme", write(tmp_path / "flat.jsonl", flat), tmp_path)[0] == want


def test_videomme_parquet(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = sys.modules["pyarrow"].Table.from_pylist([MME])
    parquet.write_table(table, tmp_path / "test-00000-of-00001.parquet")
    rows = prepared("videomme", tmp_path, tmp_path)[0]                                       # a folder that holds it
    assert rows == prepared("videomme", write(tmp_path / "mme.json", [MME]), tmp_path)[0]


def test_parquet_without_pyarrow_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    path = write(tmp_path / "test.parquet", "PAR1")
    with pytest.raises(UserError, match="test.parquet: parquet needs pyarrow: pip install pyarrow"):
        prepared("videomme", path, tmp_path)


def test_videomme_subtitles_are_those_of_the_frames_that_are_seen(tmp_path):
    clip(tmp_path / "media" / "ab-C_1.mp4")                                    # 4 s; at 1 fps frames at 0, 1, 2, 3
    cues = [("00:00:00,500 --> 00:00:00,900", "between frames"), ("00:00:01,500 --> 00:00:02,100", "seen at two"),
            ("00:00:09,000 --> 00:00:10,000", "after the end")]
    write(tmp_path / "srt" / "subtitle" / "ab-C_1.srt", "".join(
        f'{i}\n{time}\n<font color="white" size=".72c">{said}</font>\n\n' for i, (time, said) in enumerate(cues, 1)))
    plain = {**MME, "videoID": "no_subtitles", "question_id": "2"}
    path = write(tmp_path / "mme.json", [MME, plain])
    rows = prepared("videomme", path, tmp_path, "quick", subtitles=tmp_path / "srt")[0]
    assert asked(rows[0])[1].startswith("This video's subtitles are listed below:\nseen at two\nSelect the best")
    assert asked(rows[1])[1].startswith("Select the best")
    with pytest.raises(UserError, match="no .srt files"):
        prepared("videomme", path, tmp_path, subtitles=tmp_path / "media")


# ---- MLVU -----------------------------------------------------------------------------------------------------------

def mlvu(video="1.mp4", candidates=("x", "y", "z", "w"), answer="y"):
    return {"video": video, "duration": 467.9, "question": "Which?", "candidates": list(candidates), "answer": answer,
            "question_type": "findNeedle"}


def mlvu_folder(folder, **tasks):
    """The official folder: a file for each task, one sound question where nothing else is given."""
    for number, task in enumerate(MODULES["mlvu"].TASKS, 1):
        write(folder / f"{number}_{task}.json", tasks.get(task, [mlvu()]))
    write(folder / "8_sub_scene.json", [{"video": "s.mp4", "question": "Describe.", "scoring_points": []}])
    return folder


def test_mlvu_rows_and_the_bad_ones(tmp_path):
    bad = [mlvu(), mlvu(candidates="xyyw"), mlvu(answer="absent"), mlvu(candidates=("",) * 4, answer="")]
    clip(tmp_path / "media" / "2_needle" / "1.mp4")
    rows, flawed, missing = prepared("mlvu", mlvu_folder(tmp_path / "json", needle=bad), tmp_path)
    needles = [row for row in rows if row["kind"] == "needle"]
    assert len(rows) == 10 and [row["answer"] for row in needles] == ["B", "C", "", "D"]     # the last match, or none
    assert [row["groups"]["annotation"] for row in needles] == ["sound", "flawed", "flawed", "flawed"]
    assert flawed == [f"mlvu-needle-00{i}: {n} of the options {needles[i]['options']} are the answer {answer!r}"
                      for i, n, answer in ((1, 2, "y"), (2, 0, "absent"), (3, 4, ""))]
    video, text, _ = asked(needles[0])
    assert video["video"] == "../media/2_needle/1.mp4"
    assert text.endswith("Question: Which?\nOptions:\n(A) x\n(B) y\n(C) z\n(D) w\nOnly give the best option.")
    # six other tasks have a 1.mp4 of their own, which is not there: no other task's video takes its place
    assert len(missing) == 6 and asked(rows[0])[0]["video"] == "../media/1_plotQA/1.mp4"


def test_mlvu_m_avg_by_hand(tmp_path):
    """Needle has 4 questions, the other tasks one: M-Avg is the mean of seven accuracies, not of ten answers."""
    bad = [mlvu(), mlvu(candidates="xyyw"), mlvu(answer="absent"), mlvu(candidates=("",) * 4, answer="")]
    rows = prepared("mlvu", mlvu_folder(tmp_path / "json", needle=bad), tmp_path)[0]
    texts = {"needle": ["B) y", "(C) y", "", "A"], "plotQA": ["B. y"], "ego": ["y"], "count": [None],
             "order": ["(A) x"], "anomaly_reco": ["B"], "topic_reasoning": ["The answer is (B)"]}
    texts = [texts[row["kind"]].pop(0) for row in rows]
    score = evaluation.score_mcq(texts, rows)
    assert score["macro"] == pytest.approx((0.5 + 1 + 1 + 0 + 0 + 1 + 1) / 7) and score["acc"] == 6 / 10
    low, high = score["macro_ci"]                                              # seven clips
    assert 0.2 < low < 0.5 < 0.8 < high <= 1
    assert score["groups"]["annotation"] == {"sound": {"value": 5 / 7, "n": 7}, "flawed": {"value": 1 / 3, "n": 3}}
    assert (score["missing"], score["unparsed"]) == (1, 1)
    # the official rule takes the character before the first ")", or the whole text: "B. y" and "y" are wrong there
    assert score["official"]["macro"] == pytest.approx((0.5 + 0 + 0 + 0 + 0 + 1 + 1) / 7)
    assert score["official"]["acc_n"] == 10


def test_mlvu_needs_all_tasks_or_one_file(tmp_path):
    folder = mlvu_folder(tmp_path / "json")
    assert {row["kind"] for row in prepared("mlvu", folder / "3_ego.json", tmp_path)[0]} == {"ego"}
    (folder / "3_ego.json").unlink()
    with pytest.raises(UserError, match="no file for ego"):
        prepared("mlvu", folder, tmp_path)


# ---- EgoSchema ------------------------------------------------------------------------------------------------------

def ego(uid, **more):
    return {"q_uid": uid, "google_drive_id": "g", "question": "What is C doing?",
            **{f"option {i}": f"thing {i}" for i in range(5)}, **more}


def test_egoschema_rows(tmp_path):
    write(tmp_path / "questions.json", [ego("u1"), ego("u2"), ego("u3")])
    write(tmp_path / "subset_answers.json", {"u3": 0, "u1": 4})
    rows, flawed, missing = prepared("egoschema", tmp_path, tmp_path)
    assert [(row["id"], row["answer"]) for row in rows] == [("egoschema-u1", "E"), ("egoschema-u3", "A")]
    assert asked(rows[0])[1] == ("What is C doing?\nA. thing 0\nB. thing 1\nC. thing 2\nD. thing 3\nE. thing 4\n"
                                 "Answer with the option's letter from the given choices directly.")
    assert not flawed and len(missing) == 2
    score = evaluation.score_mcq(["E", "thing 1"], rows)
    assert score["acc"] == 0.5 and "official" not in score          # the official server takes letters, not texts


@pytest.mark.parametrize("questions, answers, named", [
    ([{k: v for k, v in ego("u1").items() if k != "question"}], {"u1": 0}, "questions.json: entry 0 has no 'question'"),
    ([{k.replace(" ", "_"): v for k, v in ego("u1").items()}], {"u1": 0}, "field 'option 0'"),
    ([ego("u1")], {"u1": 5}, "u1 is 5: must be 0 to 4"), ([ego("u1")], {"u1": 1, "u2": 1}, "lacks 1 questions.*u2"),
    ([ego("u1")], '{"u1": 1, "u1": 2}', "subset_answers.json: .*'u1' comes twice"), ([ego("u1")], [1], "an object"),
    ({"u1": ego("u1")}, {"u1": 1}, "a list of objects"), ("{", {"u1": 1}, "questions.json: cannot be read")])
def test_egoschema_mistakes_are_named(questions, answers, named, tmp_path):
    write(tmp_path / "questions.json", questions)
    write(tmp_path / "subset_answers.json", answers)
    with pytest.raises(UserError, match=named):
        prepared("egoschema", tmp_path, tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_repeated_question_stays_a_row_and_is_listed(tmp_path):
    write(tmp_path / "questions.json", [ego("u1"), ego("u1")])
    write(tmp_path / "subset_answers.json", {"u1": 1})
    rows, flawed, _ = prepared("egoschema", tmp_path, tmp_path)
    assert [row["id"] for row in rows] == ["egoschema-u1", "egoschema-u1#2"]
    assert flawed == ["egoschema-u1#2: the id u1 comes more than once"]


# ---- LVBench --------------------------------------------------------------------------------------------------------

def lvbench(*qa):
    return {"key": "Yt1", "type": "cartoon", "video_info": {"duration_minutes": 61.5, "fps": 30}, "qa": list(qa)}


QA = {"uid": "55", "question": "Which year (A.D.)?\n(A) 1\n(B) 2 (two)\n(C) 3\n(D) 4", "answer": "D",
      "question_type": ["key information retrieval", "reasoning"], "time_reference": "00:15-00:19"}


def test_lvbench_rows(tmp_path):
    odd = {**QA, "uid": 56, "question": "No options here", "time_reference": "", "question_type": ["reasoning"]}
    path = write(tmp_path / "video_info.meta.jsonl", [lvbench(QA, odd)])
    rows, flawed, missing = prepared("lvbench", path, tmp_path, "authors")
    assert rows[0]["question"] == "Which year (A.D.)?" and rows[0]["options"] == ["1", "2 (two)", "3", "4"]
    assert rows[0]["groups"] == {"question_type": ["key information retrieval", "reasoning"], "type": "cartoon"}
    assert rows[0]["evidence"] == [[15, 19]] and rows[0]["duration"] == 3690 and "evidence" not in rows[1]
    assert asked(rows[0])[0] == {"type": "video", "video": "../media/Yt1.mp4", "fps": 4, "max_frames": 1024,
                                 "frame_tokens": [256, 256]}
    assert asked(rows[0])[1] == ("Which year (A.D.)?\n(A) 1\n(B) 2 (two)\n(C) 3\n(D) 4\n"
                                 "Answer the question with the option letter.")
    assert flawed == ["lvbench-56: no options found in the question"] and rows[1]["answer"] == "D"
    assert missing == [f"{tmp_path / 'media' / 'Yt1.mp4'}: 2 rows"]


def test_lvbench_videos_as_the_official_script_downloads_them(tmp_path):
    """video2dataset numbers the files; which video each is stands in the .json beside it."""
    for number, url in enumerate(("Other", "Yt1")):
        clip(tmp_path / "media" / "00000" / f"0000000{number}.mp4", seconds=1)
        write(tmp_path / "media" / "00000" / f"0000000{number}.json", {"url": f"https://www.youtube.com/watch?v={url}"})
    write(tmp_path / "media" / "00000_stats.json", [])
    rows, _, missing = prepared("lvbench", write(tmp_path / "a.meta.jsonl", [lvbench(QA)]), tmp_path)
    assert asked(rows[0])[0]["video"] == "../media/00000/00000001.mp4" and not missing


@pytest.mark.parametrize("reference, spans", [
    ("00:15-00:19", [[15, 19]]), ("62:05-1:02:10", [[3725, 3730]]), ("01:02:03", [[3723, 3724]]), (None, []),
    ("0:10-0:20, 1:00-1:10", [[10, 20], [60, 70]]), ("00:07-00:07", [[7, 8]]), ("whole video", [])])
def test_lvbench_time_references(reference, spans):
    assert MODULES["lvbench"].spans(reference) == spans


def test_lvbench_scores_by_hand(tmp_path):
    """A question of two types counts in both. The official script leaves out what was not answered; we say wrong."""
    other = {**QA, "uid": "56", "question_type": ["reasoning"], "answer": "A"}
    path = write(tmp_path / "a.meta.jsonl", [lvbench(QA, other, {**other, "uid": "57"})])
    rows = prepared("lvbench", path, tmp_path)[0]
    score = evaluation.score_mcq(["(D) 4", "(A)", None], rows)
    types = {"key information retrieval": {"value": 1.0, "n": 1}, "reasoning": {"value": pytest.approx(2 / 3), "n": 3}}
    assert score["acc"] == pytest.approx(2 / 3) and score["groups"]["question_type"] == types
    assert score["official"]["acc"] == 1 and score["official"]["acc_n"] == 2
    assert score["official"]["groups"]["question_type"]["reasoning"] == {"value": 1.0, "n": 2}


def test_lvbench_evidence_of_an_agent_run(tmp_path, monkeypatch):
    clip(tmp_path / "media" / "Yt1.mp4")
    none = {**QA, "uid": "2", "time_reference": None, "question_type": ["summarization"]}
    path = write(tmp_path / "a.meta.jsonl", [lvbench(QA, {**QA, "uid": "1", "time_reference": "00:30-00:40"}, none)])
    rows, seen = prepared("lvbench", path, tmp_path, "quick")[0], []

    def run_agent(live, video, question, options, budget, facts, media, without):
        seen.append((question, options, budget, media))
        return SimpleNamespace(answer="(D) 4", evidence=[(14.0, 19.0)], budget_exhausted="", frames=8, tokens=9,
                               trace=[])

    monkeypatch.setattr(mcr_agent, "LiveModel", lambda *_, **how: None)
    monkeypatch.setattr(mcr_agent, "run_agent", run_agent)
    monkeypatch.setattr(evaluation, "answer_rows", lambda model, processor, rows, *_, **__: ["A"] * len(rows))
    result = evaluation.evaluate_agent(None, None, rows, tmp_path / "out", abreast=1)["official"]
    question, options, budget, media = seen[0]
    assert (question, options, media) == ("Which year (A.D.)?", ["1", "2 (two)", "3", "4"], {"frame_tokens": [16, 64]})
    assert (budget.frames, budget.coarse, budget.tokens) == (64, 24, mcr_agent.Budget.tokens + 32 * (64 + 16))
    assert (result["agentic"], result["direct"], result["agentic_n"]) == (1, 0, 3)
    assert (result["evidence_hit"], result["evidence_hit_n"]) == (0.5, 2)                    # of those that name any
    assert result["groups"]["evidence_hit"]["question_type"]["reasoning"] == {"value": 0.5, "n": 2}
    assert result["groups"]["agentic"]["question_type"]["summarization"] == {"value": 1.0, "n": 1}


# ---- Charades-STA ---------------------------------------------------------------------------------------------------

CHARADES = """AB12C 1.0 3.0##a person opens a door.
AB12C 2.0 9.5##a person sits down.
AB12C 2.0 9.5##a person sits down.
AB12C 30.0 35.5##a person laughs.
AB12C 3.0 1.0##a person eats.
GONE1 0.0 4.5##a person drinks.
"""


def test_charades_rows(tmp_path):
    clip(tmp_path / "media" / "AB12C.mp4", seconds=4)
    rows, flawed, missing = prepared("charades_sta", write(tmp_path / "charades_sta_test.txt", CHARADES), tmp_path)
    assert [row["answer"] for row in rows] == [[1, 3], [2, 4], [2, 4], [30, 35.5], [1, 3], [0, 4.5]]
    assert [row.get("annotated") for row in rows] == [None, [2, 9.5], [2, 9.5], None, [3, 1], None]
    assert [row.get("duration") for row in rows] == [4, 4, 4, 4, 4, None]
    assert len({row["id"] for row in rows}) == 6                               # equal lines stay two rows
    assert [line.partition(": ")[2] for line in flawed] == [
        *["2 to 9.5 s of a video of 4.00 s"] * 2, "30 to 35.5 s of a video of 4.00 s", "runs from 3 to 1 s"]
    assert missing == [f"{tmp_path / 'media' / 'GONE1.mp4'}: 1 rows"]
    assert "textual sentence: a person opens a door. Please return" in asked(rows[0])[1]
    with pytest.raises(UserError, match=r"test.txt:2: not 'ID START END##SENTENCE': 'AB12C 1.0##y'"):
        prepared("charades_sta", write(tmp_path / "charades_sta_test.txt", "A 1 2##x\nAB12C 1.0##y\n"), tmp_path)


def test_charades_scores_by_hand(tmp_path):
    clip(tmp_path / "media" / "AB12C.mp4", seconds=4)
    lines = "".join(line + "\n" for line in CHARADES.splitlines()[:4])
    rows = prepared("charades_sta", write(tmp_path / "charades_sta_test.txt", lines), tmp_path)[0]
    texts = ["The event happens in the 1.0 - 2.0 seconds", "2.0 - 4.0", "9.5 - 1.0 seconds", "30 - 35.5"]
    score = evaluation.score_grounding(texts, rows)
    assert score["miou"] == pytest.approx((0.5 + 1 + 2 / 3 + 0) / 4)           # both cut to the 4 s that there are
    assert (score["r1_30"], score["r1_50"], score["r1_70"]) == (0.75, 0.75, 0.25)
    assert score["official"]["miou"] == pytest.approx((0.5 + 2 / 7.5 + 7.5 / 8.5 + 1) / 4)   # neither is cut
    assert [score["official"][f"r1_{p}"] for p in (30, 50, 70)] == [0.75, 0.75, 0.5]


# ---- scores ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rule, text, letter", [
    ("videomme", "The best answer is B", "B"), ("videomme", "Based on the video, the answer is C", "B"),
    ("videomme", "I choose b", ""), ("videomme", "A dog. So it is D", "A"), ("videomme", "Best answer: C", "B"),
    ("videomme", "", ""), ("mlvu", "B) y", "B"), ("mlvu", "(B) y", "B"), ("mlvu", "B", "B"), ("mlvu", "B. y", "B. y"),
    ("mlvu", ") y", ""), ("lvbench", "(D) 4", "D"), ("lvbench", "D", "D"), ("lvbench", "D. 4", "D"),
    ("lvbench", "The answer is (C) 3", "C"), ("lvbench", "The answer is D", "T"), ("lvbench", "x ( B y) z", "B"),
    ("lvbench", "", "")])
def test_official_extraction(rule, text, letter):
    assert official.SCRIPTS[rule].letter(text) == letter


def test_official_rules_are_read_apart_from_the_prepare_scripts(monkeypatch):
    """eval.py loads the file under a name of its own, once, and only for rows of a benchmark."""
    row = {"id": "1", "task": "mcq", "options": ["a", "b"], "answer": "A", "messages": []}
    monkeypatch.delitem(sys.modules, "data_official", raising=False)
    before = list(sys.path)
    assert "official" not in evaluation.score_mcq(["A"], [row]) and "data_official" not in sys.modules
    for _ in range(2):
        assert evaluation.score_mcq(["A"], [{**row, "official": "mlvu"}])["official"]["acc"] == 1
    assert sys.modules["data_official"] is not official and sys.path == before


def test_videomme_scores_by_hand(tmp_path):
    """The official script leaves out answers in which it finds no letter; thinking is no part of an answer."""
    long = {"duration": "long", "domain": "Sports Competition", "task_type": "OCR Problems"}
    rows = prepared("videomme", write(tmp_path / "m.json", [
        {**MME, "question_id": str(i), **(long if i > 1 else {})} for i in range(4)]), tmp_path)[0]
    texts = ["<think>A or B</think>C", "a dog", "A dog.", None]
    score = evaluation.score_mcq(texts, rows)
    assert score["acc"] == 3 / 4 and score["missing"] == 1                     # two answers by the option's text
    assert score["groups"]["duration"] == {"short": {"value": 1.0, "n": 2}, "long": {"value": 0.5, "n": 2}}
    assert score["groups"]["sub_category"] == {"Law": {"value": 0.75, "n": 4}}
    assert (score["official"]["acc"], score["official"]["acc_n"]) == (0.5, 2)                # C right, A wrong
    assert score["official"]["groups"]["duration"] == {"short": {"value": 1.0, "n": 1}, "long": {"value": 0.0, "n": 1}}
    mixed = evaluation.score_mcq(texts, [*rows[:3], {**rows[3], "official": "mlvu"}])
    assert "official" not in mixed                                             # two benchmarks have no common rule


# ---- presets and running ------------------------------------------------------------------------------------------

def test_the_authors_settings(tmp_path):
    """formats.md §2: fps 4, and per benchmark frames, tokens of a frame, new tokens."""
    want = {"videomme": (1024, [256, 256], 16), "lvbench": (1024, [256, 256], 16), "mlvu": (2048, [256, 256], 16),
            "egoschema": (2048, [64, 128], 16), "charades_sta": (512, [256, 256], 50)}
    for name, settings in want.items():
        preset = MODULES[name].AUTHORS
        assert (preset["max_frames"], preset["frame_tokens"], preset["max_new"]) == settings and preset["fps"] == 4


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    tokenizer = iv3.Tokenizer(["video", "The best answer is:"])
    model = iv3.build_model(iv3.Config.preset("tiny", layers=1, deepstack=()), tokenizer).eval()
    model.init_weights()
    return model, iv3.Processor(tokenizer, model.cfg)


def test_a_result_says_what_it_was_made_with(tmp_path, model, monkeypatch, capsys):
    clip(tmp_path / "media" / "ab-C_1.mp4", seconds=4, side=64)
    gone = {**MME, "videoID": "gone", "question_id": "2"}
    lengths, generate = [], iv3.generate
    monkeypatch.setattr(iv3, "generate", lambda *a, **k: lengths.append(a[3]) or generate(*a, **k))
    results = {}
    for preset in ("default", "quick"):
        monkeypatch.setitem(official.PRESETS[preset], "max_new", 3)
        prepared("videomme", write(tmp_path / "m.json", [MME, gone]), tmp_path, preset)
        results[preset] = evaluation.evaluate(*model, tmp_path / "out" / "videomme.jsonl")
    assert lengths == [3, 3] and [r["meta"]["max_new"] for r in results.values()] == lengths    # the preset's
    quick, default = results["quick"]["meta"], results["default"]["meta"]
    assert quick["preset"]["name"] == "quick" and quick["preset"]["frame_tokens"] == [16, 64]
    assert default["samples"]["videomme-001-1"]["frames"] == 8 and quick["samples"]["videomme-001-1"]["frames"] == 4
    # 64×64 pixels are 4 tokens; quick asks for 16 at least. 8 frames are 4 patches, 4 frames are 2
    tokens = {name: r["meta"]["samples"]["videomme-001-1"]["tokens"] for name, r in results.items()}
    stamps = 2 * len(model[1].tokenizer.encode("<0.5 seconds><|vision_start|><|vision_end|>"))
    assert tokens["default"] - tokens["quick"] == 4 * 4 - 2 * 16 + stamps
    assert list(quick["samples"]) == ["videomme-001-1"]                        # the missing one has none …
    assert results["quick"]["mcq"]["acc_n"] == 2 and results["quick"]["mcq"]["missing"] == 1  # … but counts
    assert quick["prompt_hash"] != default["prompt_hash"]                      # another sampling is another prompt
    moved = tmp_path / "moved"
    (moved / "media").mkdir(parents=True)
    (tmp_path / "media").rename(moved / "media" / "deep")
    prepared("videomme", tmp_path / "m.json", moved, "quick")
    rows = iv3.load_rows(moved / "out" / "videomme.jsonl")
    assert evaluation.made_with(model[0], rows, {}, 0)["prompt_hash"] == quick["prompt_hash"]  # wherever files lie
    scores = {"mcq": evaluation.score_mcq(["C", "I say A", "", None], rows * 2)}
    text = evaluation.render_scores({**scores, "baselines": evaluation.baselines(rows * 2, [])})
    lines = [line.split("|")[1:4] for line in text.splitlines() if line.startswith("| ")]
    figures = {name.strip(): (value.strip(), n.strip()) for name, value, n in lines}
    assert figures["acc"] == (".25±.25", "4") and figures["duration: short"] == (".25", "4")
    assert figures["by the official rule: acc"] == (".50", "2")


@pytest.mark.parametrize("change, named", [
    (dict(preset="fast"), "--preset fast: use one of default, quick, authors"),
    (dict(annotations=Path("nowhere.json")), "--annotations nowhere.json"),
    (dict(media=Path("nowhere")), "--media nowhere")])
def test_wrong_flags_are_named(change, named, tmp_path):
    module, annotations = MODULES["videomme"], write(tmp_path / "m.json", [MME])
    arguments = dict(annotations=annotations, media=tmp_path, out=tmp_path / "out", preset="quick") | change
    with pytest.raises(UserError, match=named):
        official.prepare("videomme", 1, module.OURS, module.AUTHORS, module.convert, **arguments)


@pytest.mark.parametrize("change, named", [
    (dict(options=["A. One.", "Two.", "C. Three.", "D. Four."]), "question 001-1: only some options"),
    (dict(answer="E"), "videomme-001-1: field 'answer' is 'E'"), (dict(duration=12), "field 'duration' is '12'"),
    (dict(question=None), "entry 0: field 'question' is 'None'")])
def test_rows_that_do_not_fit_are_named(change, named, tmp_path):
    with pytest.raises(UserError, match=named):
        prepared("videomme", write(tmp_path / "m.json", [{**MME, **change}]), tmp_path)


def test_two_files_of_one_name_are_refused(tmp_path):
    for folder in "ab":
        clip(tmp_path / "media" / folder / "ab-C_1.mp4", seconds=1)
    with pytest.raises(UserError, match="ab-C_1.mp4 is there more than once"):
        prepared("videomme", write(tmp_path / "m.json", [MME]), tmp_path)
