"""Language models that read images: training, generating, and the job that needs no download."""
