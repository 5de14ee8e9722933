"""Ask the teacher for two rated summaries of every extract, through the `together` client.

Reads data/extracts/{train,test}.jsonl, appends to data/replies/{train,test}.jsonl. Every reply is
on disk before it counts; a later run asks only for what is missing for this model and prompt.
The endpoint and the key come from TOGETHER_BASE_URL and TOGETHER_API_KEY.

    TOGETHER_API_KEY=... python -m data_prep.generate_replies --model openai/gpt-oss-120b
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import together
import yaml
from together import AsyncTogether
from tqdm import tqdm

from data_prep.records import (
    UserError,
    append_record,
    appending,
    load_records,
    positive,
    read_records,
    run,
    script_parser,
    warn,
)
from prompts import render, template_sha

TEMPLATE = "summarize/teacher.jinja"
PRICES = Path(__file__).with_name("teachers.yaml")
FAILURES_IN_A_ROW = 10  # after so many, the endpoint is taken to be down


def cost_usd(usage: dict, price: dict | None) -> float | None:
    """Dollars for one reply; None where no price is known."""
    if price is None:
        return None
    tokens_in, tokens_out = usage["prompt_tokens"], usage["completion_tokens"]
    return (tokens_in * price["input"] + tokens_out * price["output"]) / 1e6


def missing_extracts(extracts: list[dict], replies: Path, model: str) -> list[dict]:
    """The extracts that have no reply by this model to the present prompt."""
    sha = template_sha(TEMPLATE)
    done = set()
    if replies.exists():
        done = {
            r["id"]
            for r in read_records(replies, ("id", "model", "prompt_sha"))
            if (r["model"], r["prompt_sha"]) == (model, sha)
        }
    return [extract for extract in extracts if extract["id"] not in done]


async def ask(
    client: AsyncTogether, extract: dict, args: argparse.Namespace, price: dict | None
) -> dict:
    """One reply record. Raises together.APIError, ValueError for an answer that is no reply."""
    answer = await client.chat.completions.create(
        model=args.model,
        messages=[{"role": "user", "content": render(TEMPLATE, text=extract["text"])}],
        max_tokens=args.max_tokens,
        temperature=args.temperature,
    )
    if not answer.choices:
        raise ValueError("the endpoint sent a reply without choices")
    used = answer.usage
    usage = {
        "prompt_tokens": used.prompt_tokens if used else 0,
        "completion_tokens": used.completion_tokens if used else 0,
    }
    return {
        "id": extract["id"],
        "model": args.model,
        "prompt_sha": template_sha(TEMPLATE),
        # A reply can be empty (all tokens spent on thinking); it is paid for and so kept.
        "text": answer.choices[0].message.content or "",
        "finish_reason": answer.choices[0].finish_reason,
        "usage": usage,
        "cost_usd": cost_usd(usage, price) if used else None,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def explain(error: Exception, model: str) -> str | None:
    """One line for an error that asking again cannot mend; None for any other."""
    detail = _detail(error)
    if isinstance(error, together.AuthenticationError | together.PermissionDeniedError):
        return f"the endpoint refuses the key ({detail}); check TOGETHER_API_KEY"
    if isinstance(error, together.NotFoundError):
        return f"the endpoint does not know {model} ({detail}); check --model and TOGETHER_BASE_URL"
    if isinstance(error, together.APIStatusError) and error.status_code == 402:
        return f"the endpoint wants payment ({detail})"
    return None


def _detail(error: Exception) -> str:
    body = getattr(error, "body", None)
    inner = body.get("error", body) if isinstance(body, dict) else body
    text = inner.get("message") if isinstance(inner, dict) else None
    return " ".join(str(text or error).split())[:200]


async def generate(
    client: AsyncTogether,
    extracts: list[dict],
    log: BinaryIO,
    bar: tqdm,
    args: argparse.Namespace,
    price: dict | None,
) -> int:
    """Ask for every extract, `args.concurrency` at a time. Returns how many got no reply.

    Raises UserError when asking on is of no use.
    """
    queue: Iterator[dict] = iter(extracts)
    tokens = dollars = failed = in_a_row = 0

    async def work() -> None:
        nonlocal tokens, dollars, failed, in_a_row
        for extract in queue:
            try:
                reply = await ask(client, extract, args, price)
            except (together.APIError, ValueError) as error:
                if line := explain(error, args.model):
                    raise UserError(line) from None
                failed, in_a_row = failed + 1, in_a_row + 1
                if in_a_row >= min(FAILURES_IN_A_ROW, len(extracts)):
                    raise UserError(
                        f"{in_a_row} requests in a row failed, the last with: "
                        f"{_detail(error)}; check {client.base_url} and run again"
                    ) from None
                continue
            append_record(log, reply)
            in_a_row = 0
            tokens += sum(reply["usage"].values())
            dollars += reply["cost_usd"] or 0
            spent = f"${dollars:.4f}" if price else "cost unknown"
            bar.set_postfix_str(f"{tokens:,} tokens, {spent}, {failed} failed", refresh=False)
            bar.update()

    tasks = [asyncio.create_task(work()) for _ in range(args.concurrency)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return failed


def make_client() -> AsyncTogether:
    """A client of the endpoint in the environment. Raises UserError if there is no key."""
    base_url = os.environ.get("TOGETHER_BASE_URL") or None
    key = os.environ.get("TOGETHER_API_KEY")
    if not key and not base_url:
        raise UserError(
            "no teacher to ask: set TOGETHER_API_KEY to your key, or TOGETHER_BASE_URL "
            "to an OpenAI-compatible endpoint (without /v1)"
        )
    if base_url and base_url.rstrip("/").endswith("/v1"):
        raise UserError(f"TOGETHER_BASE_URL is {base_url}; leave out /v1, the client adds it")
    return AsyncTogether(api_key=key or "none", base_url=base_url, timeout=300, max_retries=6)


async def generate_split(split: str, args: argparse.Namespace) -> int:
    """Complete the replies of one split. Returns how many extracts are still without one."""
    extracts = load_records(args.extracts / f"{split}.jsonl", ("id", "text"), "just extracts")
    price = yaml.safe_load(PRICES.read_text()).get(args.model)
    path = args.output / f"{split}.jsonl"
    with appending(path) as log:
        missing = missing_extracts(extracts[: args.limit], path, args.model)
        print(
            f"{split}: {len(extracts[: args.limit]):,} extracts, {len(missing):,} without a reply",
            flush=True,
        )
        if not missing:
            return 0
        if price is None:
            warn(f"no price for {args.model} in {PRICES.name}: what this costs is not known here")
        async with make_client() as client:
            with tqdm(total=len(missing), desc=f"{split} replies", unit="reply") as bar:
                return await generate(client, missing, log, bar, args, price)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--extracts", type=Path, default=Path("data/extracts"), help="folder")
    parser.add_argument("--output", type=Path, default=Path("data/replies"), help="folder")
    parser.add_argument("--splits", nargs="+", default=["train", "test"], choices=["train", "test"])
    parser.add_argument("--model", default="openai/gpt-oss-120b", help="the teacher")
    parser.add_argument("--limit", type=positive, help="only the first N extracts of each split")
    parser.add_argument("--concurrency", type=positive, default=16, help="requests in flight")
    parser.add_argument("--max-tokens", type=positive, default=4096, help="longest reply")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the teacher's sampling")
    args = parser.parse_args()
    make_client()
    failed = {split: asyncio.run(generate_split(split, args)) for split in args.splits}
    if any(failed.values()):
        sys.exit(f"error: {sum(failed.values())} extracts got no reply; run again to ask for them")


if __name__ == "__main__":
    run(main)
