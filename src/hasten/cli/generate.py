"""`hasten generate MODEL`: complete a prompt."""

import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.base.errors import ConfigError, UserError
from hasten.cli import options
from hasten.cli.terminal import write

if TYPE_CHECKING:
    from hasten.engine import LLM, Chunk, Completion, SamplingParams

DRAWING, PLACING = options.Drawing(), options.Placing()


@options.spread
def generate(
    model: options.ModelArgument,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Text to continue; '-' reads standard input.")] = None,
    token_ids: Annotated[
        str | None, typer.Option("--token-ids", help="Prompt as comma-separated ids, for models without tokenizer.")
    ] = None,
    drawing: options.Drawing = DRAWING,
    choices: Annotated[int, typer.Option("--choices", help="Outputs to make; with a seed, each is repeatable.")] = 1,
    best_of: Annotated[int | None, typer.Option("--best-of", help="Outputs to draw, of which the likeliest per token are kept.")] = None,
    beams: Annotated[int | None, typer.Option("--beams", help="Search with so many beams instead of drawing.")] = None,
    length_penalty: Annotated[float, typer.Option("--length-penalty", help="With --beams: above 0 favours long outputs.")] = 1.0,
    logprobs: Annotated[
        int | None,
        typer.Option("--logprobs", help="With --json: each token's log-probability and those of so many likeliest; 0 for none of them."),
    ] = None,
    prompt_logprobs: Annotated[int | None, typer.Option("--prompt-logprobs", help="The same for the prompt.")] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt before its continuation.")] = False,
    placing: options.Placing = PLACING,
    source: Annotated[
        Path | None, typer.Option("--input", help='Prompts as JSON lines: {"prompt": TEXT} or {"token_ids": [1, 2]}, and sampling fields.')
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Where the answers to --input go. One that is there is gone on with.")
    ] = None,
    max_sequences: Annotated[int, typer.Option("--max-sequences", min=1, help="Most prompts of --input that run together.")] = 32,
    as_json: options.JsonOption = False,
) -> None:
    """Continue a prompt, printing text as it comes, or every prompt of a file."""
    if (source is None) != (output is None):
        raise ConfigError("--input and --output go together: prompts from one file, answers to another")
    if [prompt, token_ids, source].count(None) != 2:
        raise ConfigError("give the prompt once: --prompt TEXT, --prompt - for standard input, --token-ids 1,2,3, or --input FILE")
    from hasten.engine import BeamSearch

    if not as_json and source is None and (logprobs is not None or prompt_logprobs is not None):
        raise ConfigError("--logprobs and --prompt-logprobs are for programs; add --json")
    if choices < 1:
        options.refuse("--choices", choices, "a number of outputs, 1 or more")
    params = dataclasses.replace(
        drawing.params(), n=choices, best_of=best_of, logprobs=logprobs, prompt_logprobs=prompt_logprobs, echo=echo and token_ids is None,
        beam=None if beams is None else BeamSearch(width=beams, length_penalty=length_penalty),
    )  # fmt: skip
    if source is not None and output is not None:
        _generate_file(placing.open(model, max(max_sequences, params.sequences)), source, output, params)
        return
    text = read_stdin() if prompt == "-" else prompt
    given: Any = parse_ids(token_ids) if token_ids is not None else text
    llm = placing.open(model, params.sequences)
    if text is not None:
        given = llm.encode(text)
    if as_json:
        began = time.perf_counter()
        outputs = llm.generate([given], params)
        seconds = time.perf_counter() - began
        for done in outputs:
            if done.error is not None:
                raise UserError(f"output {done.choice}: {done.error}")
            print_json(model, text, done, seconds, sum(len(one.token_ids) for one in outputs))
        return
    began, count, has_text, last = time.perf_counter(), 0, llm.model.tokenizer is not None, 0
    chunks = llm.stream([given], params) if params.n == 1 else in_order(llm.stream([given], params))
    for chunk in chunks:
        if chunk.error is not None:
            raise UserError(chunk.error)
        if chunk.choice != last:
            write("\n---\n")
            last = chunk.choice
        count += len(chunk.token_ids)
        write(chunk.text if has_text else "".join(f"{token} " for token in chunk.token_ids))
    seconds = time.perf_counter() - began
    write("\n")
    if sys.stderr.isatty():
        print(f"[{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s, {chunk.finish_reason}]", file=sys.stderr)


def print_json(model: str, prompt: str | None, done: "Completion", seconds: float, tokens: int) -> None:
    """One output as one line; ``tokens`` in all were made in ``seconds``."""
    line: dict[str, Any] = {
        "model": model, "prompt": prompt, "prompt_token_ids": done.prompt_token_ids, "text": done.text, "token_ids": done.token_ids,
        "finish_reason": done.finish_reason, "seconds": seconds, "tokens_per_s": tokens / seconds, "choice": done.choice,
    }  # fmt: skip
    for name, entries in (("logprobs", done.logprobs), ("prompt_logprobs", done.prompt_logprobs)):
        if entries is not None:
            line[name] = [entry.plain() for entry in entries]
    typer.echo(json.dumps(line))


def in_order(chunks: "Iterable[Chunk]") -> "Iterator[Chunk]":
    """One output after another, though they are made together."""
    later: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        if chunk.choice == 0:
            yield chunk
        else:
            later.setdefault(chunk.choice, []).append(chunk)
    for _, its in sorted(later.items()):
        yield from its


def _generate_file(llm: "LLM", source: Path, output: Path, params: "SamplingParams") -> None:
    """Answer the prompts of a file that an earlier run left, with a progress bar."""
    from rich.console import Console
    from rich.progress import Progress

    from hasten.engine.jsonl import answer_lines, done_lines, read_lines

    lines = read_lines(source, params)
    done = done_lines(output)
    left, failed, console = [line for line in lines if line.number not in done], 0, Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"{source.name} → {output.name}", total=len(lines), completed=len(lines) - len(left))
        for answer in answer_lines(llm, left, output):
            failed += any("error" in one for one in answer.get("outputs", [answer]))
            progress.advance(task)
    earlier = f", {len(lines) - len(left)} were answered before" if len(left) < len(lines) else ""
    print(f"answered {len(left) - failed} prompts in {output}, {failed} with an error{earlier}", file=sys.stderr)


def read_stdin() -> str:
    """Standard input, whole. Raises UserError where it is no text."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not {error.encoding} text (byte {error.start}); convert it") from None


def parse_ids(text: str) -> list[int]:
    """Comma-separated token ids. Raises UserError naming the piece that is no number."""
    ids = []
    for piece in text.split(","):
        if not piece.strip().isdecimal() or len(piece.strip()) > 9:
            raise UserError(f"--token-ids has {piece.strip()[:40]!r}; comma-separated whole numbers are needed, as in 1,2,3")
        ids.append(int(piece))
    return ids
