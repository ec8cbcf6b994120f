"""DeepSpeed engines and Hugging Face models: the only room that imports deepspeed and transformers."""
