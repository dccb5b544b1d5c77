"""Train a causal prompt with PEFT, for tests: no head is saved with it, as in most published prompts.

    python -m tests.support.train_prompt MODEL STORIES OUT [--seed 0] [--steps 40]

MODEL is the folder of a causal language model, STORIES a text whose blank lines separate paragraphs. The last of them
are trained on, and the first, which tests evaluate, are not. OUT gets `adapter_config.json` and
`adapter_model.safetensors`. It takes a few seconds on a CPU.
"""

import argparse
from pathlib import Path

import torch

TOKENS = 8  # of the prompt
LENGTH = 128  # tokens of a training text
BATCH = 8
BEGINNING = "Once upon a time, there was a little girl."  # what the prompt is before it is trained


def train_prompt(model: Path, stories: Path, out: Path, *, seed: int = 0, steps: int = 40) -> list[float]:
    """Write the adapter to the folder `out` and return the loss of every step, in nats a token."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    whole = AutoModelForCausalLM.from_pretrained(model)
    texts = _texts(AutoTokenizer.from_pretrained(model), stories)
    settings = peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=TOKENS,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=BEGINNING,
        tokenizer_name_or_path=str(model),
    )
    tuned = peft.get_peft_model(whole, settings)
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    losses = []
    for _ in range(steps):
        batch = texts[torch.randint(len(texts), (BATCH,))]
        loss = tuned(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tuned.save_pretrained(out)
    return losses


def _texts(tokenizer, stories: Path) -> torch.Tensor:
    """Return (texts, LENGTH) tokens of the last paragraphs, one after the other."""
    paragraphs = stories.read_text(encoding="utf-8").split("\n\n")
    ids = tokenizer("\n\n".join(paragraphs[-400:]), verbose=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("stories", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    found = train_prompt(given.model, given.stories, given.out, seed=given.seed, steps=given.steps)
    print(f"loss {found[0]:.4f} at first, {found[-1]:.4f} at last")
