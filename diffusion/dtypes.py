"""The safetensors format's names for dtypes. Imports torch alone, so that a card can begin early."""

import torch

# Scaled formats (fp8 and below) mean nothing without their scales.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
