"""A foreign publisher: sends what it is told to a RabbitMQ queue, by pika.

Reads one message id per line from standard input; the body is {"id": ID}.
"""
import sys

import pika

url, queue = sys.argv[1:]
connection = pika.BlockingConnection(pika.URLParameters(url))
channel = connection.channel()
channel.confirm_delivery()
sent = 0
for line in sys.stdin:
    message_id = line.strip()
    properties = pika.BasicProperties(message_id=message_id, delivery_mode=2, content_type="application/json")
    channel.basic_publish("", queue, f'{{"id": "{message_id}"}}'.encode(), properties, mandatory=True)
    sent += 1
connection.close()
print(sent)
