"""What a small run imports, and what it leaves out although libraries ask for it."""

import subprocess
import sys

from petals_eval.demo import demo_paths

SCRIPT = """if True:
    import sys
    from petals_eval.data import DataSource, load_rows
    from petals_eval.metrics import DEFAULT_METRICS, compute_metrics
    from petals_eval.metrics.paired import detectable_share, mcnemar
    from petals_eval.model import LocalModel
    from petals_eval.swarm import SwarmConnection

    model, data = sys.argv[1:]
    local = LocalModel.from_pretrained(model)
    local.tokenizer("a meal")
    rows = load_rows(DataSource(path=data))
    assert [row.index for row in rows.at(__import__("numpy").array([3, 5]))] == [3, 5]
    compute_metrics(DEFAULT_METRICS, [0, 1], [0, 1], [[0.9, 0.1], [0.2, 0.8]], label_names=("a", "b"))
    assert mcnemar(48, 39) > 0.05 and detectable_share(500, 87) and detectable_share(50_000, 8_700)
    heavy = ("datasets", "pandas", "scipy.linalg", "scipy.stats", "sklearn", "sympy")
    print([name for name in (*heavy, "torch._dynamo", "torch.distributed.tensor") if name in sys.modules])

    # They are there for whoever asks.
    import scipy.optimize
    from hivemind.averaging.load_balancing import load_balance_peers
    from scipy.optimize import minimize
    from scipy.optimize._linprog import linprog
    assert scipy.optimize.linprog is linprog and minimize(lambda x: (x - 1) ** 2, 0.0).success
    assert sum(load_balance_peers(10, [1.0, 1.0])) == 10
    from transformers.utils.type_validators import ACT2FN as checked
    assert "silu" in checked and "sliu" not in checked and len(checked) > 10 and "gelu" in list(checked)
    from transformers.activations import ACT2FN, GELUActivation
    assert checked["silu"].__class__ is ACT2FN["silu"].__class__ and isinstance(GELUActivation().act, object)
    from transformers import LlamaForCausalLM
    print(type(LlamaForCausalLM.from_pretrained(model).model.layers[0].mlp.act_fn).__name__)
"""


def test_a_small_run_imports_what_it_needs() -> None:
    """Seconds of imports that no evaluation needs are left out, and come when something else asks for them."""
    paths = demo_paths()
    command = [sys.executable, "-c", SCRIPT, str(paths.model), str(paths.data)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["[]", "SiLUActivation"]


def test_a_command_imports_next_to_nothing_before_ctrl_c_is_its_own() -> None:
    """What is imported before that ends with a traceback of thirty lines."""
    script = "import petals_eval.cli, sys; print({'pydantic', 'typer', 'rich', 'numpy', 'torch'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", script], text=True, timeout=60) == "set()\n"
