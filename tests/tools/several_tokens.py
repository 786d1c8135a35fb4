"""Steps of several tokens on a small artifact, for a memory checker: python -m tests.tools.several_tokens ARTIFACT [--no-graph] [--brief]

The artifact has steps of 2, 4 and 8 tokens and two rows or more. Timelines of all rows join, leave and join again; then drafts of every
length are verified, some of them wrong. Each text is compared with the same alone and without drafts.
"""

from __future__ import annotations

import argparse

import kiln

LENGTHS, NEW = (1, 40, 7, 150, 33), 12  # of prompts, of which some pass rings of 128; of answers
BRIEF, FEW = (3, 36), 4  # where every access of a kernel is looked at


def prompt(length: int) -> list[int]:
    """Token ids below 200."""
    return [3 + i * 7919 % 190 for i in range(length)]


def batched(batch: kiln.Batch, prompts: tuple[int, ...], new: int) -> dict[int, list[int]]:
    """Texts by length of prompt: as many timelines as there are rows, each the next to join where one has left."""
    waiting, texts, lengths = list(prompts), dict[int, list[int]](), dict[int, int]()
    while waiting or lengths:
        while waiting and len(lengths) < batch.rows:
            length = waiting.pop()
            handle = batch.join(prompt(length), max_new_tokens=new, stop_at_eog=False)
            lengths[handle], texts[length] = length, []
        for handle, token, why, error in batch.step():
            assert not error, error
            texts[lengths[handle]] += [] if token is None else [token]
            if why:
                del lengths[handle]
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-graph", action="store_true")
    parser.add_argument("--brief", action="store_true", help="two prompts, and drafts of 1, 3 and 7")
    given = parser.parse_args()
    model, graph = kiln.Model(given.artifact, given.device), not given.no_graph
    lengths, new, drafts = (BRIEF, FEW, (1, 3, 7)) if given.brief else (LENGTHS, NEW, range(1, 8))
    batch = kiln.Batch(model, graph=graph)
    texts = batched(batch, lengths, new)
    alone = kiln.Batch(model, rows=1, graph=graph)
    for length in lengths:
        assert {length: texts[length]} == batched(alone, (length,), new), f"another text behind {length} tokens"

    def session() -> kiln.Session:
        found = kiln.Session(model, graph=graph)
        found.prefill(prompt(lengths[1]))
        return found

    text, counts = session().generate(new, None, False)[0], []
    for most in drafts:
        drafted, script = session(), kiln.ScriptedDrafter(text, [0.7] * most, model.vocab_size, seed=most)
        assert drafted.generate(new, None, False, draft=script)[0] == text, f"{most} drafts a step change the text"
        counts.append(drafted.draft_counts["steps"])
    print(f"{len(texts)} timelines in {batch.rows} rows, drafts of {list(drafts)} in {counts} steps: every text as alone")


if __name__ == "__main__":
    main()
