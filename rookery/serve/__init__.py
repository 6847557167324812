"""An HTTP server for one model, with OpenAI's API.

`schema` says what goes over the wire, `prompts` turns a question into requests to the engine, `reading` takes answers
apart, `answers` puts them into OpenAI's form, `service` holds what all requests share, `app` has the routes, `guard`
decides who may ask, `server` runs it all and ends in good order.
"""
