"""ss1-compile: smaller and faster PyTorch models through sketch structured transforms (SS1)."""
