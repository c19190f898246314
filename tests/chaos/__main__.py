"""The whole programme: `python -m tests.chaos [--only WORDS] [--short]`. It takes about ten minutes, uses loopback
only, and ends what it has started."""

import argparse
import asyncio
import time

from tests.chaos.scenarios import SCENARIOS, Scale

FULL = Scale(topics=10, followers=2, rate=1000, times=10, pause=5.0, hang=10.0)
HEADS = ("what breaks", "seconds", "confirmed", "refused", "delivered", "came back", "told", "broken promises", "")


async def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="What is promised, while things break.")
    parser.add_argument("--only", metavar="WORDS", default="", help="the scenarios with these words in their names")
    parser.add_argument("--short", action="store_true", help="as the tests run them")
    arguments = parser.parse_args()
    rows = [HEADS]
    broken = 0
    for name, scenario in SCENARIOS.items():
        if arguments.only not in name:
            continue
        print(f"{name} …", flush=True)
        begin = time.monotonic()
        outcome = await scenario(Scale() if arguments.short else FULL)
        problems = outcome.problems()
        broken += len(problems)
        for problem in problems[:20]:
            print(f"  {problem}", flush=True)
        ledger = outcome.ledger
        row = (
            name,
            f"{time.monotonic() - begin:.0f}",
            len(ledger.confirmed),
            ledger.refused,
            ledger.delivered,
            sum(follower.returns for follower in ledger.followers),
            ledger.told,
            len(problems),
            ", ".join(f"{figure}: {value}" for figure, value in outcome.figures.items()),
        )
        rows.append(tuple(map(str, row)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADS))]
    for row in rows:
        print("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main()))
