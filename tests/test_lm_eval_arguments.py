"""What lm_eval's --model_args may hold."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from named_skips import NO_LM_EVAL

from baichuan import LLM
from baichuan.errors import ConfigError

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason=NO_LM_EVAL)


def test_lm_evals_own_arguments_are_taken(engine):
    from baichuan.api.lm_eval import BaichuanLM

    more = {"batch_size": "auto", "max_batch_size": 8, "device": "cpu"}  # what simple_evaluate adds
    made = BaichuanLM.create_from_arg_string(f"engine_dir={engine}", more)
    assert made.max_length == BaichuanLM.create_from_arg_obj({"engine_dir": str(engine)}, more).max_length == 128


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"devise": "cuda"},
            "^the model argument devise is not known; use engine_dir, tokenizer_dir, device, batch_size",
        ),
        ({"pretrained": "x", "dtype": "auto"}, "^the model argument dtype is not known"),
        ({"device": "cuda:0"}, "^device 'cuda:0' is not known; use one of auto, cpu, cuda"),
        ({"engine_dir": None}, "^the model argument engine_dir is missing; give the folder that build.py wrote$"),
        ({"engine_dir": ""}, "^engine_dir '' is no path"),
        ({"engine_dir": None, "llm": "x"}, "^the model argument llm is 'x', which is no LLM; give engine_dir instead$"),
    ],
)
def test_model_arguments_that_cannot_be_used_are_refused(engine, given, message):
    from baichuan.api.lm_eval import BaichuanLM

    with pytest.raises(ConfigError, match=message):
        BaichuanLM(**{"engine_dir": str(engine), **given})


def test_an_open_engine_stands_alone(engine):
    from baichuan.api.lm_eval import BaichuanLM

    llm = LLM(engine)
    assert BaichuanLM(llm=llm).llm is llm
    for given in ({"engine_dir": str(engine)}, {"device": "cpu"}):
        with pytest.raises(ConfigError, match=f"^{min(given)} and llm, an open engine, are both given; leave one"):
            BaichuanLM(llm=llm, **given)
