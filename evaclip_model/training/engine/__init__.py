"""From a loss to an optimizer step: DeepSpeed's ZeRO, or plain torch."""
