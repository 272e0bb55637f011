"""One module per program that owns a model; each turns that program's model into a `Denoiser`."""
