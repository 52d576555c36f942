"""What a model can still do, alone or beside another: answers, perplexity, agreement, speed."""
