"""EVA-CLIP in torch: models, weights, data reading, training and zero-shot evaluation."""
