"""Every optional package is used here and nowhere else: extractors, classifiers, DeepSpeed, FSDP2."""
