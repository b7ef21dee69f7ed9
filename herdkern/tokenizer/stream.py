"""Text from ids that arrive one by one, as a model samples them."""

import codecs
from collections.abc import Callable, Sequence

import numpy as np


class StreamDecoder:
    """Turns ids into text as they come, holding back the bytes of a character that is not complete yet.

    The texts of all `push` and the last `finish` joined are what `Tokenizer.decode` makes of all ids.
    """

    def __init__(self, decode_bytes: Callable[[Sequence[int] | np.ndarray], bytes], errors: str = "replace") -> None:
        self._decode_bytes = decode_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, ids: int | Sequence[int] | np.ndarray) -> str:
        """The text that one id, or several, complete; empty inside a character.

        Raises: ValueError naming the first id that is no token's, after which nothing of this call was taken in.
        """
        return self._decoder.decode(self._decode_bytes([ids] if isinstance(ids, int | np.integer) else ids))

    def finish(self) -> str:
        """What is left of a character that never became complete, by `errors`; then the decoder starts afresh.

        Raises: UnicodeDecodeError with errors="strict" if there is such a rest.
        """
        try:
            return self._decoder.decode(b"", final=True)
        finally:
            self._decoder.reset()
