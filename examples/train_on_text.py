"""A tokenizer and a tiny Llama 3 from plain strings in half a minute, then a few words from it.

Run: python examples/train_on_text.py
"""

import tempfile
from pathlib import Path

from herdkern.data.document import Document, document_id, write_documents
from herdkern.data.mix import TokenSampler
from herdkern.data.pack import PackConfig, TokenDataset, pack_documents
from herdkern.model import ModelConfig, Transformer
from herdkern.model.generate import GenerateConfig, generate
from herdkern.tokenizer import train_bpe
from herdkern.train import PackedBatches, ScheduleConfig, TrainConfig, Trainer

SENTENCES = ["the cat sat on the mat.", "the dog sat on the log.", "a bird sang to the cat.", "a frog sang to the dog."]
texts = [" ".join(SENTENCES[(i + j) % 4] for j in range(8)) for i in range(64)]

with tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary)
    tokenizer = train_bpe(texts, vocab_size=320)
    tokenizer.save(folder / "tokenizer")
    write_documents(
        folder / "texts.jsonl.zst", [Document(id=document_id(text, str(i)), text=text) for i, text in enumerate(texts)]
    )
    pack_documents(folder / "tokenizer", [folder / "texts.jsonl.zst"], folder / "tokens", PackConfig())
    dataset = TokenDataset(sorted((folder / "tokens").glob("shard-*")))

    train = TrainConfig(
        steps=60, seq_len=64, batch_size=8, dtype="fp32", schedule=ScheduleConfig(peak_lr=1e-2, warmup_steps=5)
    )
    shape = ModelConfig(
        vocab_size=tokenizer.n_vocab, dim=48, num_layers=2, num_heads=3, num_kv_heads=1, head_dim=16, ffn_dim=160
    )
    model = Transformer(shape)
    sampler = TokenSampler({"text": dataset}, {"text": 1.0}, train.seq_len, seed=0)
    result = Trainer(model, train, PackedBatches(sampler, train), folder / "run").fit()
    print(f"{result.step} steps, {result.tokens:,} tokens; checkpoint {result.checkpoint.name}")

    prompt = [tokenizer.bos_id, *tokenizer.encode_ordinary("the cat")]
    [answer] = generate(model.eval(), [prompt], GenerateConfig(max_new_tokens=24))
    print("the cat" + tokenizer.decode(answer))
