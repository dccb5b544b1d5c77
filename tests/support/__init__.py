"""What tests share: tensors, tiny models, swarms to run over, and a bare client of the wire."""
