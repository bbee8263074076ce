"""Make a bucket on the S3 server of AWS_ENDPOINT_URL, unless it is there: `bucket.py NAME`."""

import sys

import boto3


def main(name):
    client = boto3.client("s3")
    if name not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=name)


if __name__ == "__main__":
    main(sys.argv[1])
