"""A finished model's answers to AlpacaEval 2 and MT-Bench, sampled by its run's sampler, in their file formats."""

import glob
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from srlm_mega.chat import Chat
from srlm_mega.errors import UserError
from srlm_mega.evaluation.export_formats import (
    AlpacaInstruction,
    AlpacaOutput,
    MtBenchQuestion,
    alpaca_json,
    mt_bench_line,
)
from srlm_mega.records import Candidate, Prompt, PromptTokens, SampledText, SampledTexts, read_jsonl, write_jsonl
from srlm_mega.run.files import check_place, discard, sweep, write_atomic
from srlm_mega.run.identity import responding
from srlm_mega.run.sealed_file import fingerprint, is_whole, write_sealed
from srlm_mega.sampling.sampler import SamplingParams
from srlm_mega.sampling.samplers import Samplers
from srlm_mega.seeds import derive_seed
from srlm_mega.stages.head_to_head import AnyModel, begin, print_progress
from srlm_mega.stages.responses import respond

MT_BENCH_TOKENS = 1024  # longest answer in FastChat


def export_alpaca_eval(
    model: AnyModel,
    instructions: Sequence[AlpacaInstruction],
    generator: str,
    temperature: float,
    out: Path,
) -> int:
    """Write a model's answers to AlpacaEval's instructions; return the number of those left out because a whole answer
    would not fit. After a kill the same call resumes in `<out>.partial`."""
    prompts = [Prompt(str(number), one.instruction, one.dataset) for number, one in enumerate(instructions)]
    top_p = model.config.evaluation.top_p
    identity = {
        "model": model.writer.name,
        "instructions": [one.instruction for one in instructions],
        "temperature": temperature,
        "top_p": top_p,
        "settings": responding(model.config),
    }
    with unfinished(model, out, identity) as (samplers, folder, target):
        file, on_progress = folder / "responses.jsonl", partial(print_progress, "responses")
        too_long = respond(samplers, model.writer, prompts, temperature, top_p, file, on_progress)
        outputs = [
            AlpacaOutput(candidate.prompt, candidate.text, generator, instructions[int(candidate.prompt_id)].dataset)
            for candidate in read_jsonl(file, Candidate)
        ]
        write_atomic(target, alpaca_json(outputs))
    return too_long


def export_mt_bench(model: AnyModel, questions: Sequence[MtBenchQuestion], model_id: str, out: Path) -> None:
    """Write a model's answers to every turn of MT-Bench's questions. UserError when a turn does not fit. After a kill
    the same call resumes in `<out>.partial`."""
    chat = Chat.from_folder(model.writer.folder)
    conversations = [Conversation(question, (), ()) for question in questions]
    identity = {"model": model.writer.name, "questions": questions, "settings": responding(model.config)}
    with unfinished(model, out, identity) as (samplers, folder, target):
        for turn in range(max(len(question.turns) for question in questions)):
            for temperature in sorted({question.temperature for question in questions}):
                conversations = take_turn(model, chat, samplers, folder, conversations, turn, temperature)
        now = time.time()
        write_atomic(target, b"".join(mt_bench_line(one.question, model_id, one.answers, now) for one in conversations))


@contextmanager
def unfinished(model: AnyModel, out: Path, identity: Mapping[str, object]) -> Iterator[tuple[Samplers, Path, Path]]:
    """Yield samplers, the folder `<out>.partial` in which an export of this identity begins or resumes, and the file
    to write, which is what `out` links to where it is a link. The folder goes when the block has written the file.
    UserError where there can be no such file, or the folder is another export's."""
    check_place(out)
    target = Path(os.path.realpath(out))
    folder = target.with_name(f"{target.name}.partial")
    begin(folder, identity)
    sweep(target.parent.glob(f".{glob.escape(target.name)}.*"))
    with closing(Samplers(model.config, folder / "replicas")) as samplers:
        yield samplers, folder, target
    discard(folder)


@dataclass(frozen=True)
class Conversation:
    """A question, the token ids of all turns so far, and the answers as text."""

    question: MtBenchQuestion
    token_ids: tuple[int, ...]
    answers: tuple[str, ...]

    def answered(self, prompt: tuple[int, ...], completion: SampledText, chat: Chat) -> "Conversation":
        """Return the conversation with one more turn; a cut-off answer gets the end token that it lacks."""
        end = () if completion.token_ids[-1] in chat.end_ids else chat.end_ids[:1]
        return Conversation(self.question, prompt + completion.token_ids + end, (*self.answers, completion.text))


def take_turn(
    model: AnyModel,
    chat: Chat,
    samplers: Samplers,
    folder: Path,
    conversations: Sequence[Conversation],
    turn: int,
    temperature: float,
) -> list[Conversation]:
    """Answer a turn of the conversations that have it and are sampled at this temperature; return all of them, in
    order. The answers are kept in `folder`. UserError when a prompt leaves no room for an answer."""
    length = min(MT_BENCH_TOKENS, model.config.candidates.max_new_tokens)
    prompts = {
        number: one.token_ids + (chat.next_prompt if turn else chat.prompt)(one.question.turns[turn])
        for number, one in enumerate(conversations)
        if turn < len(one.question.turns) and one.question.temperature == temperature
    }
    names = {number: str(conversations[number].question.question_id) for number in prompts}
    longest = model.config.longest_prompt(length)
    too_long = [names[number] for number, prompt in prompts.items() if len(prompt) > longest]
    if too_long:
        raise UserError(
            f"turn {turn + 1} of questions {', '.join(too_long)} leaves no room for an answer (prompts above {longest} "
            "tokens), and MT-Bench needs all of them: give a model of a run with a larger model.seq_length"
        )
    # A call's draws follow from the seed and the position, so turns and temperatures need seeds of their own.
    seed = derive_seed(model.config.run.seed, "mt_bench", turn, str(temperature))
    params = SamplingParams(1, temperature, 1.0, length, seed)
    requests = [PromptTokens(names[number], prompt) for number, prompt in prompts.items()]
    part, made_from = folder / f"turn_{turn}_{temperature}", fingerprint(seed, of=requests)
    file = part.with_name(f"{part.name}.jsonl")
    if not is_whole(file, made_from):
        answers = samplers.ask(model.writer.sampled, requests, params, part)
        write_sealed(file, partial(write_jsonl, records=answers), made_from)
    result = list(conversations)
    for (number, prompt), answer in zip(prompts.items(), read_jsonl(file, SampledTexts), strict=True):
        result[number] = result[number].answered(prompt, answer.completions[0], chat)
    return result
