"""The forms of OpenAI's and Anthropic's interfaces: fields -> what is wished, events -> records. No more than that."""
