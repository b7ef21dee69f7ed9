"""The Llama 3 models as released, on records that you give with --data.inputs.

Source: Llama 3 (arXiv:2407.21783): Table 3 (shapes, peak learning rates), section 3.2 (15.6 T tokens, 128 k entries),
section 3.4.1 (8,000 steps of warm-up, cosine over 1,200,000 steps to a hundredth of the peak, the ramp), section 3.4.2
(800 B tokens in six stages from 8 k to 128 k; whether they are among the 15.6 T is not said, here they are the last),
section 3.4.3 (annealing on the last 40 M tokens, averaged).
"""

import dataclasses

from herdkern.model.config import ModelConfig, llama3_8b, llama3_70b, llama3_405b
from herdkern.recipes.config import DataConfig, MixConfig, Recipe, SampleConfig, TokenizerConfig
from herdkern.train.config import LLAMA3_LENGTHS, CheckpointConfig, LongContextConfig, ScheduleConfig, TrainConfig
from herdkern.train.ramp import LLAMA3_RAMP, Ramp

TOKENS = 15_600_000_000_000
LONG_CONTEXT_TOKENS = 800_000_000_000
VOCAB_SIZE = 128_256


def recipe_8b() -> Recipe:
    """Llama 3 8B: 15.6 T tokens, peak learning rate 3e-4."""
    return _recipe("llama3-8b", llama3_8b(VOCAB_SIZE), 3e-4)


def recipe_70b() -> Recipe:
    """Llama 3 70B: 15.6 T tokens, peak learning rate 1.5e-4."""
    return _recipe("llama3-70b", llama3_70b(VOCAB_SIZE), 1.5e-4)


def recipe_405b() -> Recipe:
    """Llama 3 405B: 15.6 T tokens, peak learning rate 8e-5."""
    return _recipe("llama3-405b", llama3_405b(VOCAB_SIZE), 8e-5)


def _recipe(name: str, model: ModelConfig, peak_lr: float) -> Recipe:
    first, *later = LLAMA3_RAMP
    anneal_steps = -(-40_000_000 // LLAMA3_RAMP[-1].tokens_per_step)
    return Recipe(
        name=name,
        data=DataConfig(heldout_share=0.0001),
        tokenizer=TokenizerConfig(vocab_size=VOCAB_SIZE),
        mix=MixConfig(anneal_weights=()),
        model=dataclasses.replace(model, max_seq_len=LLAMA3_LENGTHS[-1]),
        train=TrainConfig(
            steps=Ramp(LLAMA3_RAMP).steps_for(TOKENS),
            seq_len=first.seq_len,
            batch_size=first.batch_size,
            ramp=tuple(later),
            long_context=LongContextConfig(
                from_tokens=TOKENS - LONG_CONTEXT_TOKENS, check_every_steps=500, batch_multiple=16
            ),
            micro_batch_size=1,
            dtype="bf16",
            average_every_steps=1,
            eval_every_steps=1000,
            schedule=ScheduleConfig(
                peak_lr=peak_lr,
                min_lr=peak_lr / 100,
                warmup_steps=8000,
                anneal_steps=anneal_steps,
                cosine_steps=1_200_000,
            ),
            on_nonfinite="rollback",
            checkpoint=CheckpointConfig(every_steps="auto", keep_last=3),
        ),
        samples=SampleConfig(prompts=("The", "def ", "")),
    )
