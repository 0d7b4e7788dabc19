"""The main job on a pretrained model, offline."""
