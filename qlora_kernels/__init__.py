"""qlora_kernels: NF4 codec, fused linear layers, paged AdamW and PEFT methods."""
