"""The special tokens of Llama 3, in the order of their ids."""

BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"

_LLAMA3 = (
    BEGIN_OF_TEXT,
    END_OF_TEXT,
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)


def llama3_special_tokens(num_tokens: int = 256) -> tuple[str, ...]:
    """The special tokens of Llama 3.1 in id order: eleven places with names of their own, then reserved ones.

    num_tokens: how many, at least 11. Llama 3 has 256, with ids from 128,000 on.
    Raises: ValueError if num_tokens is below 11.
    """
    if num_tokens < len(_LLAMA3):
        raise ValueError(f"llama3_special_tokens: num_tokens must be at least {len(_LLAMA3)}, got {num_tokens}")
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(3, 3 + num_tokens - len(_LLAMA3)))
    return (*_LLAMA3, *reserved)
