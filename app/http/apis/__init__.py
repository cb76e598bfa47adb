"""The APIs: ours, asked now or later, and the words of OpenAI and AUTOMATIC1111 for the same job."""
