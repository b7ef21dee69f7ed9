"""What a recipe is: one frozen dataclass that holds the settings of every stage. Needs no torch.

Any field can be set on the command line by its dotted name: `herdkern run demo --train.steps 2000`.
"""

from dataclasses import dataclass, field

import tyro

from herdkern.data.corpus import CorpusConfig
from herdkern.data.crawl import CrawlConfig
from herdkern.data.extract import ExtractConfig
from herdkern.data.filter import FilterConfig
from herdkern.data.language import LanguageConfig
from herdkern.data.pack import PackConfig
from herdkern.dedup.containment import ContainmentConfig
from herdkern.dedup.documents import MinHashConfig
from herdkern.dedup.lines import LineDedupConfig
from herdkern.dedup.urls import UrlDedupConfig
from herdkern.model.config import ModelConfig, micro
from herdkern.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where documents come from and what is done to them."""

    inputs: tuple[str, ...] = ()
    """WARC, HTML, JSONL, Parquet or text files, or folders of them; none: the documentation of this Python."""
    heldout_share: float = 0.03
    """Share of the documents that is kept out of training."""
    num_workers: int = 0
    """Processes that work on shards; 0: the usable cores."""
    seed: int = 0
    """Decides which documents are held out."""
    crawl: CrawlConfig = field(default_factory=CrawlConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    urls: UrlDedupConfig = field(default_factory=UrlDedupConfig)
    minhash: MinHashConfig = field(default_factory=MinHashConfig)
    lines: LineDedupConfig = field(default_factory=LineDedupConfig)
    containment: ContainmentConfig = field(default_factory=ContainmentConfig)
    pack: PackConfig = field(default_factory=PackConfig)

    def __post_init__(self) -> None:
        if not 0 < self.heldout_share < 1:
            raise ValueError(f"DataConfig: heldout_share must be between 0 and 1, got {self.heldout_share}")
        if self.num_workers < 0:
            raise ValueError(f"DataConfig: num_workers must not be negative, got {self.num_workers}")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The vocabulary to learn, special tokens included."""

    vocab_size: int = 8192
    """Entries of the vocabulary; a small corpus may end with fewer."""
    max_text_bytes: int = 4 << 30
    """Text to learn from, in the order of the training documents; the rest is only encoded."""

    def __post_init__(self) -> None:
        if self.vocab_size < 512:
            raise ValueError(f"TokenizerConfig: vocab_size must be at least 512, got {self.vocab_size}")


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """How much of each batch comes from each source; a source that is not named is drawn by its size."""

    weights: tuple[tuple[str, float], ...] = ()
    """Pairs of source and factor on its share by size, in pretraining."""
    anneal_weights: tuple[tuple[str, float], ...] = (("web", 3.0), ("package", 3.0))
    """The same for the annealing steps: sources of higher quality are drawn more often."""

    def __post_init__(self) -> None:
        for name, weight in (*self.weights, *self.anneal_weights):
            if weight < 0:
                raise ValueError(f"MixConfig: weights must not be negative, got {weight} for {name!r}")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """The texts that the trained model is asked to continue."""

    prompts: tuple[str, ...] = ()
    """Beginnings to continue; the empty text asks for a whole document."""
    max_new_tokens: int = 96
    """Tokens to write for each."""
    temperature: float = 0.8
    """0: always the most likely token."""
    top_p: float = 0.95
    """Draw from the smallest set of tokens that holds this probability."""
    seed: int = 0
    """Decides the draw."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Raw records to a trained model: all settings of one run."""

    name: tyro.conf.Suppress[str] = "recipe"
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    model: ModelConfig = field(default_factory=micro)
    train: TrainConfig = field(default_factory=TrainConfig)
    samples: SampleConfig = field(default_factory=SampleConfig)
