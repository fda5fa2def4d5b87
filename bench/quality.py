"""What filtering and choosing are worth: dirty text against the same filtered, a chosen quarter against a random one.

    python bench/quality.py ko-train.jsonl.gz en-train.jsonl.gz --held-out ko=ko-val.jsonl.gz en=en-val.jsonl.gz

Four arms get the same minutes, counted from the start of the process: reading, filtering, choosing, the tokenizer and
training are all inside.

    raw       `--megabytes` of clean text among as much made dirt that 30% of the bytes are dirt
    filtered  the same file, through `pretrain --filter`
    random    a quarter of the clean text, drawn by document
    selected  a quarter of the clean text, by `filter --budget 25%`

The dirt, in equal parts: exact and near duplicates; broken encodings (UTF-8 read as Latin-1 or CP949, replacement
characters); boilerplate (menus, notices, keywords); other languages (words made of their letters and small words in
English order). It is made from the clean text and a seed. The first table says how much of each kind is found.

A run is a process of its own on one thread, `--workers` at a time, and leaves its row in rows.jsonl: the same command
goes on where it stopped. filtered is compared with raw and selected with random, paired over seeds.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from random import Random
from statistics import mean

import runs
import torch

from twelve import report
from twelve.data.cleaning import Cleaner
from twelve.data.reader import read_documents

STARTED = time.monotonic()  # torch is there by now, in every arm
ARMS = ("raw", "filtered", "random", "selected")
AGAINST = {"filtered": "raw", "selected": "random"}
DIRT, QUARTER = 0.3, 0.25
SHAPE = {"width": 128, "layers": 6, "experts": 0, "context": 256, "batch": 16, "learning_rate": 4e-3}
SETTINGS = ("text", "megabytes", "minutes", "limit")


# --- dirt -------------------------------------------------------------------------------------------------------------


def exact(text: str, draw: Random) -> str:
    return text


def near(text: str, draw: Random) -> str:
    """Cut short, with a line above it, or with a word in a hundred changed."""
    words = text.split(" ")
    how = draw.randrange(3)
    if how == 0:
        return " ".join(words[: int(len(words) * draw.uniform(0.82, 0.95))])
    if how == 1:
        return f"{draw.choice(SITES)} {draw.randint(1, 28)}.{draw.randint(1, 12)}.{draw.randint(2005, 2024)}\n{text}"
    for at in draw.sample(range(len(words)), max(1, len(words) // 100)):
        words[at] = draw.choice(words)
    return " ".join(words)


def latin_1(text: str, draw: Random) -> str:
    return text.encode().decode("latin-1") if _is_foreign(text) else replaced(text, draw)


def cp949(text: str, draw: Random) -> str:
    return text.encode().decode("cp949", "replace") if _is_foreign(text) else replaced(text, draw)


def _is_foreign(text: str) -> bool:
    """Whether reading it in a wrong encoding does much harm."""
    return len(text.encode()) > 1.1 * len(text)


def replaced(text: str, draw: Random) -> str:
    """One character in 10 to 50 is lost."""
    share = draw.uniform(0.02, 0.1)
    return "".join(draw.choice("\ufffd\ufffd\ufffd\x00\x1a\ue000") if draw.random() < share else one for one in text)


def menu(text: str, draw: Random) -> str:
    words = [word for word in text.split() if len(word) > 2] or ["home"]
    own = [" ".join(draw.choices(words, k=draw.randint(1, 3))) for _ in range(draw.randint(10, 60))]
    lines = own + draw.choices(MENUS["en" if text[:2000].isascii() else "ko"], k=draw.randint(10, 40))
    draw.shuffle(lines)
    return draw.choice(["\n", "\n", " | ", " > "]).join(lines)


def notice(text: str, draw: Random) -> str:
    sentences = NOTICES["en" if text[:2000].isascii() else "ko"]
    return " ".join(one.replace("SITE", draw.choice(SITES)) for one in draw.sample(sentences, draw.randint(5, 8)))


def keywords(text: str, draw: Random) -> str:
    words = [word.strip(".,()\"'") for word in text.split()]
    words = sorted({word for word in words if len(word) > 2}) or ["word"]
    return draw.choice([", ", " ", " #"]).join(draw.choices(words, k=draw.randint(80, 300)))


def foreign(text: str, draw: Random) -> str:
    """The text in words of another language's letters: every word in a word of its own, the small ones in real ones."""
    language = draw.choice(list(LETTERS))
    words = [_foreign_word(language, word) for word in text.lower().split()]
    if language in ("ja", "zh"):
        return "".join(word + ("。" if draw.random() < 0.08 else "") for word in words)
    return " ".join(word + (". " if draw.random() < 0.06 else "") for word in words)


def _foreign_word(language: str, word: str) -> str:
    onsets, middles, ends, small = LETTERS[language]
    draw = Random(zlib.crc32(f"{language} {word}".encode()))
    small = small.split()
    if word in ENGLISH.split() or draw.random() < 0.3:
        return small[zlib.crc32(word.encode()) % len(small)]
    count = max(1, len(word) // 3)
    syllables = [draw.choice(onsets.split()) + draw.choice(middles.split()) for _ in range(count)]
    return "".join(syllables) + draw.choice([*ends.split(), ""])


GROUPS = ((exact, near), (latin_1, cp949, replaced), (menu, notice, keywords), (foreign,))
SITES = ("example.com", "Blue Harbour", "뉴스마당", "Daily Lantern", "한빛장터", "Northgate", "새집터", "Meadow & Co")
ENGLISH = "the of and to in a is was for as on with by that it at from his he were are this an or"
LETTERS = {  # of a language: how syllables begin, go on and end, and its small words
    "de": ("sch st gr br kl m n r s t w b d f g h z pf", "a e i o u ä ö ü au ei ie", "n r t ch nd ng l rt ck",
           "der die und das von den mit zu auf ist für nicht ein eine im des sich auch"),
    "fr": ("b c d f g j l m n p r s t v ch gr tr pl", "a e é i o u ai ou eu oi è", "r s t x nt lle tion que",
           "le la les des du et est une dans pour que qui sur avec au aux par pas"),
    "es": ("b c d f g j l m n p r s t v ll tr gr pl", "a e i o u ie ue ía ó á", "s n r ción dad do",
           "el la los las de del que en y un una por con para su se al lo"),
    "ru": ("б в г д ж з к л м н п р с т х ст пр гр", "а е и о у ы я ю ё", "й н т в м сть ние",
           "и в на с по не что из за для от как это был его к о у"),
    "ja": ("会 学 人 国 中 年 語 か さ た な は ま", "の に を は が と で も", "た る い",
           "の に は を が と で も から まで した"),
    "zh": ("会 学 人 国 中 年 语 是 有 这 我 们 他", "时 地 说 生 对 成 方 面 经 发", "了 着 过",
           "的 了 在 和 是 有 不 为 与"),
}  # fmt: skip
MENUS = {
    "en": ("Home", "About us", "Contact", "Log in", "Sign up", "My account", "Shopping cart", "Search", "Site map",
           "Careers", "Press", "Privacy policy", "Terms of use", "Read more", "Next page", "Share this", "Help",
           "Gift cards", "New arrivals", "Sale", "Newsletter", "Follow us", "Categories", "Archive", "Tags"),
    "ko": ("홈", "회사소개", "오시는 길", "로그인", "회원가입", "마이페이지", "장바구니", "검색", "사이트맵", "채용",
           "보도자료", "개인정보처리방침", "이용약관", "더보기", "다음 글", "공유하기", "고객센터", "공지사항",
           "신상품", "특가", "게시판", "갤러리", "자료실", "문의하기", "목록"),
}  # fmt: skip
NOTICES = {
    "en": (
        "SITE uses cookies to give you the best experience.", "By going on to browse you agree to our use of cookies.",
        "Read our privacy policy to learn how SITE handles your data.", "You can change your cookie settings any time.",
        "Copyright SITE. All rights reserved.", "Sign up for our newsletter and never miss an offer.",
        "Please enable JavaScript in your browser to see this page.", "Already have an account? Log in here.",
        "Use of this site is subject to the terms of service.", "Click here to manage preferences or accept cookies.",
        "Share this page with your friends and follow us.", "This content may not be reproduced without permission.",
    ),
    "ko": (
        "SITE은(는) 더 나은 서비스를 위해 쿠키를 사용합니다.", "계속 이용하시면 쿠키 사용에 동의하시는 것으로 봅니다.",
        "자세한 내용은 개인정보처리방침을 확인해 주세요.", "본 기사의 무단 전재 및 재배포 금지.",
        "저작권자 SITE. 모든 권리를 보유합니다.", "회원가입 후 이용하실 수 있습니다. 로그인 해 주세요.",
        "뉴스레터를 구독하고 새 소식을 받아 보세요.", "고객센터 운영시간은 평일 오전 9시부터 오후 6시까지입니다.",
        "이용약관에 동의하셔야 서비스를 이용하실 수 있습니다.", "비밀번호 찾기는 아래 링크를 눌러 주세요.",
        "이 글이 도움이 되었다면 공유하기를 눌러 주세요.", "사업자등록번호와 통신판매업신고 번호는 아래를 보세요.",
    ),
}  # fmt: skip


def make_dirt(clean: list[str], size: int, seed: int) -> Iterator[tuple[str, int, str]]:
    """(kind, number of the clean text that it was made of, text), about `size` bytes, a fourth of each group."""
    draw = Random(seed)
    for group in GROUPS:
        left = size / len(GROUPS)
        while left > 0:
            make, number = draw.choice(group), draw.randrange(len(clean))
            text = make(clean[number], draw)
            left -= len(text.encode())
            yield make.__name__, number, text


# --- data -------------------------------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace) -> None:
    """OUT/clean-N.jsonl, the beginning of every text; OUT/raw-SEED.jsonl, all of them and the seed's dirt, shuffled."""
    options.out.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(options.text):
        if not (file := clean_file(options, number)).exists():
            _write(file, ((f"{number}-{at}", text) for at, text in enumerate(_beginning(path, options))))
    texts = [document.text or "" for document in read_documents(clean_files(options))]
    size = sum(len(text.encode()) for text in texts)
    for seed in options.seeds:
        if not (file := options.out / f"raw-{seed}.jsonl").exists():
            rows = [(f"clean-{number}", text) for number, text in enumerate(texts)]
            dirt = make_dirt(texts, int(size * DIRT / (1 - DIRT)), seed)
            rows += [(f"{kind}-{number}", text) for kind, number, text in dirt]
            Random(seed).shuffle(rows)
            _write(file, iter(rows))


def clean_file(options: argparse.Namespace, number: int) -> Path:
    return options.out / f"clean-{number}.jsonl"


def clean_files(options: argparse.Namespace) -> list[Path]:
    return [clean_file(options, number) for number in range(len(options.text))]


def _beginning(path: str, options: argparse.Namespace) -> Iterator[str]:
    """An equal share of `--megabytes`, whole documents."""
    left = options.megabytes * 1e6 / len(options.text)
    for document in read_documents([path]):
        left -= len((document.text or "").encode())
        if left < 0:
            return
        yield document.text or ""


def _write(path: Path, rows: Iterator[tuple[str, str]]) -> None:
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        for name, text in rows:
            file.write(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n")
    temporary.rename(path)


def found(options: argparse.Namespace, seed: int) -> list[dict]:
    """Of every kind of dirt, and of the clean text, how much is dropped and as what.

    Of copies of one text the first is kept, whichever that is; a copy counts as found if no more than one is left.
    """
    counts: dict[str, dict] = {}
    left: dict[str, int] = {}  # copies of a text that were kept
    began = time.process_time()
    for verdict in Cleaner().verdicts(read_documents([options.out / f"raw-{seed}.jsonl"])):
        kind, _, number = verdict.document.about["id"].partition("-")
        count = counts.setdefault(kind, {"kind": kind, "documents": 0, "bytes": 0, "dropped": 0, "as": {}})
        copy = kind in ("clean", "exact", "near")
        again = copy and left.get(number, 0) > 0
        count["documents"] += 1
        count["bytes"] += len(verdict.text.encode())
        if copy:
            left[number] = left.get(number, 0) + (not verdict.reason)
        is_dirt = again or not copy
        count["dirt"] = count.get("dirt", 0) + is_dirt
        count["dropped"] += is_dirt and bool(verdict.reason)
        count["lost"] = count.get("lost", 0) + (not is_dirt and bool(verdict.reason))
        if verdict.reason:
            count["as"][verdict.reason] = count["as"].get(verdict.reason, 0) + 1
    seconds = time.process_time() - began
    total = sum(count["bytes"] for count in counts.values())
    print(f"{total / 1e6:.1f} MB judged at {total / 1e6 / seconds:.1f} MB/s of processor time")
    return [counts[kind] for kind in sorted(counts)]


# --- one run ----------------------------------------------------------------------------------------------------------


def run(arm: str, seed: int, options: argparse.Namespace) -> runs.Row:
    """Train one arm for its minutes, counted from the start of this process; what it measures."""
    from twelve.convert import load
    from twelve.filter import filter_text
    from twelve.train.pretrain import pretrain

    torch.set_num_threads(1)
    folder, text = options.out / f"{arm}-{seed}", options.out / f"{arm}-{seed}.jsonl"
    if arm in ("raw", "filtered"):
        text = options.out / f"raw-{seed}.jsonl"
    elif arm == "random":
        documents = [document.text or "" for document in read_documents(clean_files(options))]
        Random(seed).shuffle(documents)
        left = QUARTER * sum(len(one.encode()) for one in documents)
        sizes = (len(one.encode()) for one in documents)
        _write(text, ((str(n), one) for n, (one, size) in enumerate(zip(documents, sizes, strict=True))
                      if (left := left - size) >= 0))  # fmt: skip
    else:
        filter_text(clean_files(options), text, budget=QUARTER, workers=1, quiet=True)
    prepared = time.monotonic() - STARTED
    figures = pretrain([str(text)], folder, minutes=options.minutes, seed=seed, filter=arm == "filtered", quiet=True,
                       started=STARTED, **SHAPE)  # fmt: skip
    ended = time.monotonic() - STARTED
    network, words = load(folder, device="cpu")
    bits = runs.bits_of(network, words, options.held_out, limit=options.limit)
    return {
        "bits": bits, "tokens": figures["tokens"], "training_seconds": figures["training_seconds"],
        "choosing_seconds": prepared, "seconds": ended,
    }  # fmt: skip


# --- all of them ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", metavar="TEXT", help="clean text, of each an equal share")
    parser.add_argument("--held-out", nargs="+", type=runs.named, required=True, metavar="NAME=PATH")
    parser.add_argument("--limit", type=int, default=200, help="documents of each that are measured (default: 200)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", nargs="+", type=int, default=[3, 4, 5])
    parser.add_argument("--megabytes", type=float, default=24, help="of clean text (default: 24)")
    parser.add_argument("--minutes", type=float, default=6, help="a run, all included (default: 6)")
    runs.add_options(parser, "runs/quality")
    options = parser.parse_args()
    if job := options.one:
        runs.add_row(options.out, job | run(job["arm"], job["seed"], options))
        return
    prepare(options)
    dirt = found(options, options.seeds[0])
    for line in dirt:
        share = line["dropped"] / line["dirt"] if line["dirt"] else 0.0
        clean = line["documents"] - line["dirt"]
        lost = f"{line['lost']} lost of {clean} clean" if clean else ""
        print(f"{line['kind']:9} {line['dropped']:5} of {line['dirt']:5} found ({share:.1%})  {lost}  {line['as']}")
    alone = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}  # the tokenizer, too
    failed = runs.run_all(jobs(options), "{arm}, seed {seed}", options.out, options.workers, alone)
    rows = runs.read_rows(options.out, settings(options))
    print_table(rows)
    tables = {"Dirt that was found": [line | {"as": str(line["as"])} for line in dirt],
              "At the end of equal minutes": summary(rows), "Paired over seeds": verdicts(rows)}  # fmt: skip
    shown = [report.table(lines, caption) for caption, lines in tables.items()]
    report.write_report(options.out / "report.html", "What filtering and choosing are worth", [("Result", shown)])
    runs.end(failed)


def settings(options: argparse.Namespace) -> dict:
    """What makes two rows comparable."""
    return {name: getattr(options, name) for name in SETTINGS} | {"held_out": dict(options.held_out), "shape": SHAPE}


def jobs(options: argparse.Namespace) -> list[runs.Job]:
    same = settings(options)
    return [{"arm": arm, "seed": seed, "settings": same} for seed, arm in product(options.seeds, options.arms)]


# --- what they say ----------------------------------------------------------------------------------------------------


def summary(rows: list[dict]) -> list[dict]:
    lines = []
    for arm in ARMS:
        if mine := [row for row in rows if row["arm"] == arm]:
            bits = {name: runs.spread([row["bits"][name] for row in mine]) for name in mine[0]["bits"]}
            lines.append({
                "arm": arm, "seeds": len(mine), **{name: f"{m:.4f} ± {error:.4f}" for name, (m, error) in bits.items()},
                "tokens": f"{mean(row['tokens'] for row in mine) / 1e6:.2f}M",
                "training s": f"{mean(row['training_seconds'] for row in mine):.0f}",
                "of s": f"{mean(row['seconds'] for row in mine):.0f}",
            })  # fmt: skip
    return lines


def verdicts(rows: list[dict]) -> list[dict]:
    """Bits a byte of an arm less those of the arm that it is compared with, seed by seed."""
    found = []
    for arm, other in AGAINST.items():
        ours, theirs = ({row["seed"]: row["bits"] for row in rows if row["arm"] == name} for name in (arm, other))
        seeds = sorted(ours.keys() & theirs.keys())
        for name in ours[seeds[0]] if seeds else ():
            changes = [ours[seed][name] - theirs[seed][name] for seed in seeds]
            average, error = runs.spread(changes)
            found.append({"arm": arm, "against": other, "text": name, "change": f"{average:+.4f} ± {error:.4f}",
                          "p": f"{runs.paired(changes):.3f}", "seeds": len(changes),
                          "changes": " ".join(f"{change:+.4f}" for change in changes)})  # fmt: skip
    return found


def print_table(rows: list[dict]) -> None:
    for line in [*summary(rows), *verdicts(rows)]:
        print("  ".join(f"{key} {value}" for key, value in line.items()))


if __name__ == "__main__":
    main()
