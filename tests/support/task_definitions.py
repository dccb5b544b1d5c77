"""A task of each kind as a YAML file defines it, with rows for it."""

TEXTS = ("the cat sat", "a dog ran off", "it is fine", "we all went home then")

DEFINITIONS: dict[str, tuple[dict[str, object], list[dict[str, object]]]] = {
    "classification": (
        {"text": "{text}", "label_column": "label", "label_names": ["bad", "good"]},
        [{"text": text, "label": ("bad", "good")[at % 2]} for at, text in enumerate(TEXTS)],
    ),
    "regression": (
        {"kind": "regression", "text": ["{text}", "{other}"], "label_column": "label"},
        [{"text": text, "other": f"not {text}", "label": at / 2} for at, text in enumerate(TEXTS)],
    ),
    "choice": (
        {"kind": "choice", "text": "{text}", "choices": ["{a}", "{b}"], "label_column": "label"},
        [{"text": text, "a": f"yes {at}", "b": f"no {at}", "label": at % 2} for at, text in enumerate(TEXTS)],
    ),
    "continuation": (
        {"kind": "continuation", "text": "{text}", "target": "{word}"},
        [{"text": text, "word": f"home{at}"} for at, text in enumerate(TEXTS)],
    ),
    "perplexity": ({"kind": "perplexity", "text": "{text}"}, [{"text": text} for text in TEXTS]),
    "generation": (
        {"kind": "generation", "text": "{text}", "answer_column": "answer", "metrics": ["exact_match", "token_f1"]},
        [{"text": text, "answer": [f"yes {at}", "no"]} for at, text in enumerate(TEXTS)],
    ),
}
