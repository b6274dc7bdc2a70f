"""What training needs: the step and the epoch, augmentation, optimizers, many processes, resuming."""
