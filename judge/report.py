"""From scores to pairs, and a look at them before anything is trained on.

The paper's rule (arXiv:2402.10884). With

    S = helpfulness + correctness + coherence          (complexity and verbosity are recorded, not used)

a record gives a pair where max S - min S >= 2: chosen is the best answer, rejected a random one among those with
S <= max S - 2. The other records teach nothing here, however good their answers are.

What to look at. How many records give a pair; how the scores are spread, for a judge that says 4 to everything says
nothing; how the attributes go together (the paper's Fig. 3: whoever finds an answer helpful finds it correct); whether chosen
answers are simply the longer ones; and whether the place at which an answer was shown decides: places are shuffled, so
every place should hold the best answer equally often.

    python annotate.py --data runs/annotate/records.jsonl --pairs --board board.html

Previous: judge/rubric.py.  Next: annotate.py (the whole of annotation).
"""
import html
import math
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from formats import ATTRIBUTES, image_path, quality
from judge.rubric import conversation
from judge.wire import jpeg

GAP = 2         # smallest difference in S between chosen and rejected (the paper's rule)
SHOWN = 300     # records on a board; a page with thousands of pictures opens nowhere


def choose_pair(record: dict, gap: int = GAP, seed: int = 0) -> tuple[int, int] | None:
    """(chosen, rejected) as indices into the record's answers, by the paper's rule; None where there is no pair.

    A pair given in the data stands. Ties for the best go to the first; the rejected one is drawn with a seed of its
    own per record, so that neither order nor other records matter. Answers of equal text are never paired, nor is one
    that the token budget cut off (finish "length"): its end is not the model's, and must not be taught as one.
    """
    if record.get("pair"):
        return tuple(record["pair"])
    scored = [(k, quality(a)) for k, a in enumerate(record["answers"]) if a.get("scores") and a.get("finish") != "length"]
    if not scored:
        return None
    best, top = max(scored, key=lambda ks: ks[1])
    text = record["answers"][best]["text"].strip()
    worse = [k for k, s in scored if s <= top - gap and record["answers"][k]["text"].strip() != text]
    return (best, random.Random(f"{seed}/{record['id']}").choice(worse)) if worse else None


# ---- numbers --------------------------------------------------------------------------------------------------

def statistics(records: list[dict], gap: int = GAP, seed: int = 0) -> dict:
    """Yield, spread, correlations, lengths and the judge's position bias, as plain numbers; nothing where nothing is scored."""
    scored = [[a for a in r["answers"] if a.get("scores")] for r in records]
    table = np.array([[a["scores"][name] for name in ATTRIBUTES] for answers in scored for a in answers], int).reshape(-1, 5)
    pairs = [(r, *pair) for r in records if (pair := choose_pair(r, gap, seed))]
    words = np.array([[len(r["answers"][k]["text"].split()) for k in pair] for r, *pair in pairs]).reshape(-1, 2)
    S = [[quality(a) for a in answers] for answers in scored if answers]
    mean = lambda over_pairs: float(over_pairs.mean()) if pairs else None
    with np.errstate(invalid="ignore"):                                  # an attribute that never varies correlates with none
        correlations = np.corrcoef(table.T) if len(table) > 1 else np.full((5, 5), np.nan)
    return {"records": len(records), "scored": len(S), "pairs": len(pairs), "gap": gap,
            "tied_best": sum(row.count(max(row)) > 1 for row in S), "all_equal": sum(len(set(row)) == 1 for row in S),
            "scores": {name: np.bincount(table[:, k], minlength=5).tolist() for k, name in enumerate(ATTRIBUTES)},
            "correlations": [[None if math.isnan(x) else round(float(x), 3) for x in row] for row in correlations],
            "words_chosen": mean(words[:, 0]), "words_rejected": mean(words[:, 1]),
            "chosen_longer": mean(words[:, 0] > words[:, 1]), "chosen_shorter": mean(words[:, 0] < words[:, 1]),
            "places": places(records)}


def places(records: list[dict]) -> list[dict]:
    """For every place A, B, ... at which answers were shown: mean S there, how often the best one stood there (ties shared),
    and how often it would without bias; `ci` is the 95 % half-width of that share."""
    S, best, fair = defaultdict(list), Counter(), Counter()
    for r in records:
        order = (r.get("judge") or {}).get("order")
        if not order or not all(a.get("scores") for a in r["answers"]):
            continue
        row = [quality(r["answers"][k]) for k in order]
        for place, s in enumerate(row):
            S[place].append(s)
            best[place] += (s == max(row)) / row.count(max(row))
            fair[place] += 1 / len(row)
    share = {p: fair[p] / len(S[p]) for p in S}
    return [{"place": chr(65 + p), "n": len(S[p]), "S": sum(S[p]) / len(S[p]), "best": best[p] / len(S[p]), "fair": share[p],
             "ci": 1.96 * math.sqrt(share[p] * (1 - share[p]) / len(S[p]))} for p in sorted(S)]


def show(x: dict) -> str:
    """The statistics as a page of text."""
    if not x["scored"] and not x["pairs"]:
        return f"no scores in {x['records']} records"
    out = [f"pairs: {x['pairs']} of {x['records']} records ({x['pairs'] / x['records']:.0%}) by S gap >= {x['gap']}; "
           f"{x['records'] - x['scored']} not scored, {x['all_equal']} with all answers equal, {x['tied_best']} with a tie at "
           "the top"]
    if x["pairs"]:
        out.append(f"length: chosen {x['words_chosen']:.1f} words, rejected {x['words_rejected']:.1f}; chosen is longer in "
                   f"{x['chosen_longer']:.0%} of the pairs, shorter in {x['chosen_shorter']:.0%}")
    if not x["scored"]:
        return "\n".join(out)
    out.append(f"\n{'share of answers':<14}" + "".join(f"{k:>7}" for k in range(5)) + "    mean" + " " * 4 + "correlation with"
               + "".join(f"{name[:6]:>8}" for name in ATTRIBUTES))
    for k, name in enumerate(ATTRIBUTES):
        counts, row = x["scores"][name], x["correlations"][k]
        mean = sum(v * n for v, n in enumerate(counts)) / sum(counts)
        out.append(f"{name:<16}" + "".join(f"{n / sum(counts):7.0%}" for n in counts) + f"{mean:8.2f}" + " " * 20
                   + "".join(f"{'-' if c is None else format(c, '.2f'):>8}" for c in row))
    if x["places"]:
        out.append("\nposition bias: shown at  mean S  was best  (without bias)")
        out += [f"{p['place']:>23}{p['S']:8.2f}{p['best']:10.1%}  ({p['fair']:.1%} ± {p['ci']:.1%})" for p in x["places"]]
    return "\n".join(out)


# ---- for others ------------------------------------------------------------------------------------------------

def to_trl(record: dict, pair: tuple[int, int]) -> dict:
    """TRL's conversational preference format, image markers as content parts."""
    def parts(content: str) -> list[dict]:
        texts = content.replace("<image>\n", "<image>").split("<image>")
        return [part for k, text in enumerate(texts)
                for part in ([{"type": "image"}] if k else []) + ([{"type": "text", "text": text}] if text else [])]
    prompt = [{"role": m["role"], "content": parts(m["content"])} for m in record["messages"]]
    answer = lambda k: [{"role": "assistant", "content": [{"type": "text", "text": record["answers"][k]["text"]}]}]
    return {"id": record["id"], "prompt": prompt, "chosen": answer(pair[0]), "rejected": answer(pair[1]),
            "images": record["images"]}


# ---- the board -------------------------------------------------------------------------------------------------

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 0 1rem 3rem }}
header {{ position: sticky; top: 0; background: Canvas; padding: .6rem 0 }} h1 {{ font-size: 1.15rem; margin: 0 0 .3rem }}
label {{ margin-right: 1.2rem; white-space: nowrap }} img {{ width: 100%; max-height: 20rem; object-fit: contain }}
article {{ display: grid; grid-template-columns: 13rem 1fr; gap: .3rem 1.2rem; padding: 1rem 0; border-top: 1px solid #8886 }}
article[hidden] {{ display: none }} .text {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 .3rem }}
small {{ opacity: .75; display: block; overflow-wrap: anywhere }} b {{ color: light-dark(#b3261e, #ff8a80) }}
.answer {{ border-left: 4px solid #8886; padding: .1rem .7rem; margin: .5rem 0 }} .rejected {{ border-color: #d04a40 }}
.chosen {{ border-color: #1a9a4a }} .chosen b {{ color: light-dark(#0a7a2f, #5fd38a) }}
@media (max-width: 42rem) {{ article {{ grid-template-columns: 1fr }} img {{ max-width: 16rem }} }}
</style><header><h1>{title}</h1>
<label>score gap at least <input type="range" id="gap" min="0" max="12" value="0"> <output id="at">0</output></label>
<label><input type="checkbox" id="only"> only pairs</label> <span id="count"></span></header>
{articles}
<script>
const rows = [...document.querySelectorAll("article")], $ = id => document.getElementById(id);
function filter() {{
  let n = 0; $("at").value = $("gap").value;
  for (const a of rows) {{
    a.hidden = Number(a.dataset.gap) < Number($("gap").value) || $("only").checked && !a.querySelector(".chosen");
    n += !a.hidden;
  }}
  $("count").textContent = n + " of " + rows.length + " shown";
}}
$("gap").oninput = $("only").onchange = filter; filter();
</script></html>
"""


def board(records: list[dict], root: Path, gap: int = GAP, seed: int = 0, title: str = "records and pairs") -> str:
    """One self-contained page: pictures embedded, text escaped, nothing fetched. More than SHOWN records are sampled (seeded)."""
    shown = records
    if len(records) > SHOWN:
        shown = [records[k] for k in sorted(random.Random(seed).sample(range(len(records)), SHOWN))]
        title += f" ({SHOWN} of {len(records)}, drawn with seed {seed})"
    return PAGE.format(title=html.escape(title), articles="\n".join(article(r, root, gap, seed) for r in shown))


def article(record: dict, root: Path, gap: int, seed: int) -> str:
    pair, judge = choose_pair(record, gap, seed), record.get("judge") or {}
    S = [quality(a) for a in record["answers"] if a.get("scores")]
    talk = f'<div class="text">{html.escape(conversation(record))}</div>'
    golden = html.escape(record.get("golden") or "")
    golden = golden and f'<div class="answer"><small>golden</small><div class="text">{golden}</div></div>'
    answers = "".join(one_answer(a, "chosen" if pair and k == pair[0] else "rejected" if pair and k == pair[1] else "")
                      for k, a in enumerate(record["answers"]))
    state = " · ".join(html.escape(str(judge[key])) for key in ("model", "state", "reason") if judge.get(key))
    pictures = "".join(f'<img alt="" src="data:image/jpeg;base64,{jpeg(image_path(root, name), 320)}">'
                       for name in record["images"])
    return (f'<article data-gap="{max(S) - min(S) if S else 0}"><div>{pictures}<small>{html.escape(record["id"])}</small>'
            f"<small>{state}</small></div><div>{talk}{answers}{golden}</div></article>")


def one_answer(answer: dict, role: str) -> str:
    scores, comment = answer.get("scores"), answer.get("comment") or ""
    line = f"S {quality(answer)}: " + ", ".join(f"{name} {scores[name]}" for name in ATTRIBUTES) if scores else "not scored"
    line += ", cut off by the token budget" * (answer.get("finish") == "length")
    return (f'<div class="answer {role}"><div class="text">{html.escape(answer["text"])}</div>'
            f"<small><b>{role}</b> {line}</small><small>{html.escape(comment)}</small></div>")
