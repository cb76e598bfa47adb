"""The page: a client of the HTTP API in a browser, made with Streamlit. It imports nothing of the service itself."""
