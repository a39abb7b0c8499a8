"""The layer that the reader's layer is compared with in step 11."""

from lora import LoRALinear


class Reference(LoRALinear):
    """The library's layer, trained as it is written: speed_up has no faster form of a subclass."""
