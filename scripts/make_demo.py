"""Make the demo's model, prompts and data again: petals_eval/demo/. Seeded; takes some minutes on one core.

Run it in the environment of scripts/test.sh:

    .venv/bin/python scripts/make_demo.py [--out FOLDER]

1. A grammar writes short texts about evenings out. A small Llama is trained on them as a language model. Some texts
   open with a question ("how was the food ?") and end with its answer; a review without a question has no answer.
2. The model is frozen. Prompts (Petals' `deep_ptune`) and a head without bias are tuned to tell from a review, without
   any question in it, whether its food was good. The other clauses of a review are about other things, good or bad on
   their own, so a bag of words or the general mood of a review does not give the answer.
3. The accuracy on held-out reviews is measured with the prompts, with those that there were after a third of the steps,
   and with the head of the first without any.
"""

import argparse
import itertools
import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

SEED = 20
LABEL_NAMES = ("bad", "good")
PREFIX = 8  # prompt tokens
BLOCKS = 6  # three servers hold 0:2 2:4 4:6
HIDDEN = 64
ANSWER_WEIGHT = 8.0  # one word in twenty is an answer: without this the model is slow to learn to read
MAX_LENGTH = 40  # tokens of a review
EARLY = 3  # the other prompts, to compare with, are those after the first of so many parts of the steps
UNKNOWN, START, END = "<unk>", "<s>", "</s>"

# ---------------------------------------------------------------- the grammar

THINGS = {
    "food": "soup pasta bread fish salad rice pizza cake steak curry cheese dessert stew pie sauce",
    "service": "waiter waitress staff cook barman host cashier manager owner driver",
    "place": "room table music garden terrace view light chair kitchen carpet door bar",
}
THINGS = {aspect: words.split() for aspect, words in THINGS.items()}
ADJECTIVES = {
    True: "good great nice lovely superb fine perfect wonderful pleasant excellent charming splendid",
    False: "bad awful poor horrible terrible dull dreadful nasty sad weak unpleasant dismal",
}
ADJECTIVES = {good: words.split() for good, words in ADJECTIVES.items()}
FEELINGS = {True: ["loved", "liked", "enjoyed", "praised"], False: ["hated", "disliked", "cursed", "regretted"]}
ANSWERS = {True: "yes", False: "no"}
# Ways to say an opinion. The base model never reads the last two, which makes the task less easy.
READ_FORMS, ALL_FORMS = 8, 10
STRONG = ["very", "really", "so", "quite", "rather", "simply"]
NEGATIONS = ["not", "never", "hardly", "far from", "anything but"]
OPENINGS = ["", "", "we came on monday .", "it was friday .", "i went there with my sister .", "my brother paid ."]
SKY = ["rain", "wind", "snow", "sun", "fog", "storm", "frost"]
PLACES = ["coast", "hills", "city", "river", "valley", "north", "south", "lake"]
TIMES = ["morning", "evening", "night", "afternoon", "week", "weekend"]


def clause(rng: random.Random, thing: str, good: bool, forms: int) -> str:
    """One opinion of one thing, said plainly, by negation, by contrast or through somebody's feelings.

    forms: how many of the ways to say it are used; the last two are the rarer ones.
    """
    other = not good
    adjective = rng.choice(ADJECTIVES[good])
    opposite = rng.choice(ADJECTIVES[other])
    form = rng.randrange(forms)
    if form <= 1:
        return f"the {thing} was {adjective}"
    if form == 2:
        return f"the {thing} was {rng.choice(STRONG)} {adjective}"
    if form == 3:
        return f"the {thing} was {rng.choice(NEGATIONS)} {opposite}"
    if form == 4:
        return f"the {thing} looked {opposite} yet was {adjective}"
    if form == 5:
        return f"i {rng.choice(FEELINGS[good])} the {thing}"
    if form == 6:
        return f"nobody {rng.choice(FEELINGS[other])} the {thing}"
    if form == 7:
        return f"they call the {thing} {opposite} , wrongly"
    if form == 8:
        return f"i never {rng.choice(FEELINGS[other])} the {thing}"
    return f"they never call the {thing} {opposite}"


def review(rng: random.Random, sizes: tuple[int, ...], forms: int) -> tuple[str, dict[str, bool]]:
    """A text with an opinion of as many aspects as one of `sizes` says, and what it says of each."""
    aspects = rng.sample(sorted(THINGS), rng.choice(sizes))
    opinions = {aspect: rng.random() < 0.5 for aspect in aspects}
    clauses = [clause(rng, rng.choice(THINGS[aspect]), good, forms) for aspect, good in opinions.items()]
    text = clauses[0]
    for (before, after), words in zip(itertools.pairwise(aspects), clauses[1:], strict=True):
        joint = "and" if opinions[before] == opinions[after] else "but"
        text += f" {rng.choice([joint, joint, ',', '. then'])} {words}"
    return f"{rng.choice(OPENINGS)} {text} .".strip(), opinions


def weather(rng: random.Random) -> str:
    first, second = rng.sample(SKY, 2)
    place, time_ = rng.choice(PLACES), rng.choice(TIMES)
    return rng.choice(
        [
            f"{first} came from the {place} in the {time_} .",
            f"there was {first} and {second} all {time_} in the {place} .",
            f"after the {first} the {time_} was calm in the {place} .",
        ]
    )


def document(rng: random.Random) -> str:
    """One text of the language model's training."""
    text, opinions = review(rng, sizes=(1, 1, 2, 3), forms=READ_FORMS)
    kind = rng.random()
    if kind < 0.75:
        aspect = rng.choice(sorted(opinions))
        return f"how was the {aspect} ? {text} {ANSWERS[opinions[aspect]]}"
    if kind < 0.9:
        return f"{text} {weather(rng)}"
    return f"{weather(rng)} {weather(rng)}"


def food_reviews(rng: random.Random) -> Iterator[tuple[str, int]]:
    """The labelled task: reviews with food in them, and whether it was good (1) or bad (0)."""
    while True:
        text, opinions = review(rng, sizes=(2, 2, 3), forms=ALL_FORMS)
        if "food" in opinions:
            yield text, int(opinions["food"])


def balanced(reviews: Iterator[tuple[str, int]], count: int, seen: set[str]) -> list[tuple[str, int]]:
    """`count` reviews that are not in `seen`, half of them of each label; they are added to `seen`."""
    wanted = {0: count // 2, 1: count // 2}
    chosen = []
    for text, label in reviews:
        if wanted[label] and text not in seen:
            wanted[label] -= 1
            seen.add(text)
            chosen.append((text, label))
        if not any(wanted.values()):
            return chosen
    raise RuntimeError("the grammar ran out of reviews")


# ---------------------------------------------------------------- the base model


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """One token a word; the start token is added in front."""
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: index for index, word in enumerate([UNKNOWN, START, END, *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([UNKNOWN, START, END])
    tokenizer.post_processor = TemplateProcessing(single=f"{START} $A", special_tokens=[(START, vocabulary[START])])
    return tokenizer


def batch_of(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (batch, seq) padded on the right with 0, and lengths (batch,)."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    return ids, lengths


def schedule(optimizer: torch.optim.Optimizer, steps: int, peak: float) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peak, total_steps=steps, pct_start=0.1)


def pretrain(model: LlamaForCausalLM, tokenizer: Tokenizer, rng: random.Random, steps: int) -> None:
    """Language modelling on fresh documents: the loss is that of every next word, and of the end of the text."""
    end, yes, no = (tokenizer.token_to_id(word) for word in (END, ANSWERS[True], ANSWERS[False]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    rates = schedule(optimizer, steps, 3e-3)
    for step in range(steps):
        rows = [[*encoding.ids, end] for encoding in tokenizer.encode_batch([document(rng) for _ in range(64)])]
        ids, lengths = batch_of(rows)
        targets = ids.masked_fill(torch.arange(ids.shape[1])[None] >= lengths[:, None], -100)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), reduction="none")
        weights = torch.where((targets[:, 1:] == yes) | (targets[:, 1:] == no), ANSWER_WEIGHT, 1.0).flatten()
        loss = (losses * weights).sum() / (targets[:, 1:] >= 0).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        if step % 100 == 0 or step == steps - 1:
            answer = logits[torch.arange(64), lengths - 3].argmax(-1)
            wanted = ids[torch.arange(64), lengths - 2]
            asked = (wanted == yes) | (wanted == no)
            right = (answer == wanted)[asked].float().mean()
            print(f"pretraining {step:5d}  loss {loss.item():.3f}  answers right {right:.2f}", flush=True)


# ---------------------------------------------------------------- the prompts


def add_prompts(model: LlamaModel, deep_prompts: torch.Tensor) -> list[torch.utils.hooks.RemovableHandle]:
    """As a Petals server does: before each block its prompts (prefix, hidden) are added to the first positions."""

    def hook_of(prompts: torch.Tensor):
        def hook(module, args):
            hidden = args[0]
            return (torch.cat([hidden[:, :PREFIX] + prompts, hidden[:, PREFIX:]], dim=1), *args[1:])

        return hook

    return [
        block.register_forward_pre_hook(hook_of(prompts))
        for block, prompts in zip(model.layers, deep_prompts, strict=True)
    ]


def class_logits(
    model: LlamaModel, tuned: dict[str, torch.Tensor], ids: torch.Tensor, lengths: torch.Tensor, *, prompted: bool
) -> torch.Tensor:
    """Logits (batch, labels) of the last real token, with the tuned prompts or without them."""
    rows = torch.arange(len(ids))
    embedded = model.embed_tokens(ids)
    if not prompted:
        hidden = model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        return hidden[rows, lengths - 1] @ tuned["score.weight"].T
    prompts = tuned["model.prompt_embeddings.weight"]
    deep = tuned["model.intermediate_prompt_embeddings.weight"].view(PREFIX, BLOCKS, HIDDEN).permute(1, 0, 2)
    handles = add_prompts(model, deep)
    embedded = torch.cat([prompts.expand(len(ids), -1, -1), embedded], dim=1)
    hidden = model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    for handle in handles:
        handle.remove()
    return hidden[rows, PREFIX + lengths - 1] @ tuned["score.weight"].T


def tokens_of(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    if max(map(len, rows)) > MAX_LENGTH:
        raise RuntimeError(f"a review of {max(map(len, rows))} tokens: more than {MAX_LENGTH}")
    return rows


def tune(
    model: LlamaModel, tokenizer: Tokenizer, examples: list[tuple[str, int]], rng: random.Random, steps: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tune prompts and head on the frozen model; return them, and what they were after a third of the steps."""
    model.requires_grad_(False)
    rows = tokens_of(tokenizer, [text for text, _ in examples])
    tuned = {
        "model.prompt_embeddings.weight": torch.randn(PREFIX, HIDDEN) * 0.02,
        "model.intermediate_prompt_embeddings.weight": torch.randn(PREFIX, BLOCKS * HIDDEN) * 0.02,
        "score.weight": torch.randn(2, HIDDEN) * 0.02,
    }
    parameters = [tensor.requires_grad_() for tensor in tuned.values()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    rates = schedule(optimizer, steps, 1e-2)
    early: dict[str, torch.Tensor] = {}
    for step in range(steps):
        if step == steps // EARLY:
            early = {name: tensor.detach().clone() for name, tensor in tuned.items()}
        chosen = rng.sample(range(len(rows)), 64)
        ids, lengths = batch_of([rows[index] for index in chosen])
        logits = class_logits(model, tuned, ids, lengths, prompted=True)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([examples[index][1] for index in chosen]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"tuning {step:5d}  loss {loss.item():.3f}", flush=True)
    return {name: tensor.detach() for name, tensor in tuned.items()}, early


@torch.inference_mode()
def accuracy(
    model: LlamaModel,
    tokenizer: Tokenizer,
    tuned: dict[str, torch.Tensor],
    examples: list[tuple[str, int]],
    *,
    prompted: bool,
) -> float:
    ids, lengths = batch_of(tokens_of(tokenizer, [text for text, _ in examples]))
    predictions = class_logits(model, tuned, ids, lengths, prompted=prompted).argmax(-1)
    return (predictions == torch.tensor([label for _, label in examples])).double().mean().item()


# ---------------------------------------------------------------- the folder


def save_model(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """A Hugging Face folder that old and new transformers read: only fields that both know decide anything."""
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNKNOWN,
        "bos_token": START,
        "eos_token": END,
        "model_max_length": model.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[1] / "petals_eval" / "demo"
    parser.add_argument("--out", type=Path, default=default, help="where to write (default: petals_eval/demo)")
    parser.add_argument("--pretraining-steps", type=int, default=1500)
    parser.add_argument("--tuning-steps", type=int, default=300)
    arguments = parser.parse_args()
    # One thread: sums are then added in one order, and another run on the same kind of processor gives the same bits.
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    start = time.monotonic()

    tokenizer = make_tokenizer([document(rng) for _ in range(20_000)])
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        # The usual 0.02 is for wide models: this narrow one would not begin to learn in the time it has.
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(START),
        eos_token_id=tokenizer.token_to_id(END),
    )
    model = LlamaForCausalLM(config)
    pretrain(model, tokenizer, rng, arguments.pretraining_steps)
    model.eval()

    reviews, seen = food_reviews(rng), set()
    test = balanced(reviews, 400, seen)
    tuning = balanced(reviews, 4000, seen)
    tuned, early = tune(model.model, tokenizer, tuning, rng, arguments.tuning_steps)
    expected = {
        "examples": len(test),
        "accuracy": accuracy(model.model, tokenizer, tuned, test, prompted=True),
        "accuracy_early": accuracy(model.model, tokenizer, early, test, prompted=True),
        "accuracy_without_prompts": accuracy(model.model, tokenizer, tuned, test, prompted=False),
    }

    out = arguments.out
    for folder in (out / "model", out / "prompts", out / "early-prompts"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    save_model(model, tokenizer, out / "model")
    save_file(tuned, out / "prompts" / "petals_state_dict.safetensors")
    save_file(early, out / "early-prompts" / "petals_state_dict.safetensors")
    lines = [json.dumps({"text": text, "label": LABEL_NAMES[label]}) for text, label in test]
    (out / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(out / "expected.json", expected)
    print(f"{json.dumps(expected)} in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
