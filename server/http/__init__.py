"""The protocol round the bodies: connections and their deadlines, middleware, bodies and forms in bounded memory."""
